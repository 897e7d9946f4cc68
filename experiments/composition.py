"""Which parts go together: builds every policy x budget x codec x fate, and says why the others are refused."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from kvjax.cache.budget import Budget
    from kvjax.cache.codec import Codec
    from kvjax.cache.fate import Fate
    from kvjax.cache.method import CacheMethod
    from kvjax.cache.policy import Policy

PAGE = Path(__file__).parent.parent / "docs" / "composition.md"


@dataclasses.dataclass(frozen=True)
class Config:
    """What is done with the result.

    Attributes:
      update: write docs/composition.md anew instead of printing it.
    """

    update: bool = False


class Choice(NamedTuple):
    """Names of one part per axis."""

    policy: str
    budget: str
    codec: str
    fate: str


class Parts(NamedTuple):
    """One sample of every exported part."""

    policies: Mapping[str, Policy]
    budgets: Mapping[str, Budget]
    codecs: Mapping[str, Codec]
    fates: Mapping[str, Fate]


def main(config: Config) -> None:
    """Prints the page, or writes it."""
    text = page()
    if config.update:
        PAGE.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE.name}" if config.update else text)


def samples() -> Parts:
    """Parts at their defaults, where they have them."""
    from kvjax.cache import budget, codec, fate, policy

    integer = codec.Integer(bits=4, group=32)
    return Parts(
        policies={
            "Recency": policy.Recency(),
            "Random": policy.Random(),
            "AttentionMass": policy.AttentionMass(),
            "LastAttention": policy.LastAttention(),
            "Observation": policy.Observation(),
            "Keyformer": policy.Keyformer(),
            "FixedPlace(KeyNorm)": policy.FixedPlace(policy.KeyNorm()),
            "Frozen(Keyformer)": policy.Frozen(policy.Keyformer()),
            "KeyNorm": policy.KeyNorm(),
            "KeyDiff": policy.KeyDiff(),
            "Lag": policy.Lag(),
            "ExpectedAttention": policy.ExpectedAttention(),
            "Redundancy": policy.Redundancy(),
            "Predicted": policy.Predicted(),
            "Given": policy.Given(),
            "Hidden": policy.Hidden(),
            "Chunks(Observation)": policy.Chunks(policy.Observation()),
            "Critical(Observation)": policy.Critical(policy.Observation()),
            "OverHeads(KeyDiff)": policy.OverHeads(policy.KeyDiff()),
        },
        budgets={
            "Full": budget.Full(),
            "Uniform": budget.Uniform(share=0.25),
            "Pyramid": budget.Pyramid(share=0.25),
            "Prefix": budget.Prefix(share=0.25),
            "LayerTable": budget.LayerTable((budget.Uniform(share=0.25), budget.Full()), table=(0,)),
            "HeadTable": budget.HeadTable((budget.Full(), budget.Uniform(share=0.25)), table=((1, 0),)),
            "AdaptiveHeads": budget.AdaptiveHeads(share=0.25),
        },
        codecs={
            "Identity": codec.Identity(),
            "Integer per token": integer,
            "Integer per channel": codec.Integer(bits=2, axis="channel"),
            "Float8": codec.Float8(),
            "Balanced(Integer)": codec.Balanced(integer),
            "PerChannel(Fixed)": codec.PerChannel(codec.Fixed(bits=8)),
            "ChannelSubset(Integer)": codec.ChannelSubset(integer, share=0.5),
            "NonUniform per channel": codec.NonUniform(bits=3, axis="channel"),
            "NonUniform per token": codec.NonUniform(bits=3, axis="token"),
            "LowRank": codec.LowRank(share=0.5),
            "LowRank(Integer)": codec.LowRank(codec.Integer(bits=4, axis="channel"), share=0.5, window=32),
            "Rotated(LloydMax)": codec.Rotated(codec.LloydMax(bits=3)),
            "Sketched(Rotated)": codec.Sketched(codec.Rotated(codec.LloydMax(bits=2))),
            "QJL": codec.QJL(),
            "Polar": codec.Polar(),
            "PolarPairs": codec.PolarPairs(),
            "ByLayer": codec.ByLayer((integer, codec.Integer(bits=8))),
        },
        fates={
            "Drop": fate.Drop(),
            "Demote": fate.Demote(),
            "Compensate": fate.Compensate(),
            "Represent": fate.Represent(),
            "Merge": fate.Merge(),
        },
    )


def build(parts: Parts, choice: Choice) -> CacheMethod:
    """The method of one choice, with the schedule that suits its parts.

    Raises:
      UsageError: its parts do not go together.
    """
    from kvjax.cache.method import CacheMethod

    budget, policy = parts.budgets[choice.budget], parts.policies[choice.policy]
    codec, fate = parts.codecs[choice.codec], parts.fates[choice.fate]
    block = math.lcm(codec.block, *(part.block for part in fate.codecs))
    return CacheMethod(
        name=" x ".join(choice),
        budget=budget,
        policy=policy,
        fate=fate,
        keys=codec,
        values=codec,
        sinks=4,
        recent=max(64, policy.least_recent),
        every=block if budget.evicts and policy.online and not budget.pooled else None,
    )


def tried(parts: Parts) -> Iterator[tuple[Choice, str | None]]:
    """Every choice, with the reason why it is refused, or None."""
    from kvjax.errors import UsageError

    for names in itertools.product(parts.policies, parts.budgets, parts.codecs, parts.fates):
        choice = Choice(*names)
        try:
            build(parts, choice)
        except UsageError as error:
            yield choice, str(error).partition("cannot work: ")[2] or str(error)
        else:
            yield choice, None


def page() -> str:
    """The page for people, as Markdown."""
    parts = samples()
    results = list(tried(parts))
    evicting = [(c, reason) for c, reason in results if parts.budgets[c.budget].evicts]
    lines = [
        "# Which parts go together",
        "",
        "Written by `python -m experiments.composition --update`; a test holds that it is true. One sample of every",
        "policy, budget, codec (for keys and values alike) and fate is combined with every other. What cannot work is",
        "refused when the method is made, with the reason.",
        "",
        f"**{_share(results)} of {len(results):,} combinations build**; of those whose budget evicts, "
        f"{_share(evicting)} of {len(evicting):,}.",
        "",
        "## Shares by part",
        "",
        "| axis | part | builds with the rest |",
        "| --- | --- | ---: |",
    ]
    for axis in Choice._fields:
        for name in dict.fromkeys(getattr(choice, axis) for choice, _ in results):
            mine = [(c, reason) for c, reason in results if getattr(c, axis) == name]
            lines.append(f"| {axis} | {name} | {_share(mine)} |")
    lines += ["", "## Policies and fates, by budget", "", "How many of the codecs can be combined."]
    for budget in parts.budgets:
        lines += [
            "",
            f"### {budget}",
            "",
            f"| policy | {' | '.join(parts.fates)} |",
            f"| --- |{' ---: |' * len(parts.fates)}",
        ]
        for policy in parts.policies:
            fine = Counter(c.fate for c, reason in results if (c.policy, c.budget) == (policy, budget) and not reason)
            lines.append(f"| {policy} | {' | '.join(str(fine[fate]) for fate in parts.fates)} |")
    lines += ["", "## Reasons", "", "| refused | why | for example |", "| ---: | --- | --- |"]
    reasons = Counter(reason for _, reason in results if reason)
    for reason, count in reasons.most_common():
        example = next(c for c, why in results if why == reason)
        lines.append(f"| {count:,} | {reason} | {', '.join(example)} |")
    return "\n".join(lines) + "\n"


def _share(results: list[tuple[Choice, str | None]]) -> str:
    return f"{sum(reason is None for _, reason in results) / len(results):.0%}"


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
