"""What a compiler for an accelerator needs, and what it tells: one for TPUs, one for NVIDIA GPUs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from kvjax.errors import MissingExtraError

JAX = ("jax", "jaxlib")


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """A compiler and how to listen to it.

    Attributes:
      name: key of its versions in the golden file.
      platform: what jax calls it when it lowers.
      packages: distributions beside jax and jaxlib whose versions decide what comes out.
      variables: (folder, cycles) -> environment of a process that compiles and dumps into `folder`; with `cycles` it
        also estimates them, which some kernels do not survive.
      device: topology name -> one device of it; called in the compiling process.
      code: (folder with the dumps and `stdout`) -> what the dumps say about the kernels.
    """

    name: str
    platform: str
    packages: tuple[str, ...]
    variables: Callable[[Path, bool], Mapping[str, str]]
    device: Callable[[str], Any]
    code: Callable[[Path], dict[str, int]]

    def versions(self) -> dict[str, str]:
        """Versions of everything that decides what comes out.

        Raises:
          MissingExtraError: a package is not installed here.
        """
        try:
            return {name: metadata.version(name) for name in (*JAX, *self.packages)}
        except metadata.PackageNotFoundError as error:
            raise MissingExtraError(
                f"{error.name} is not installed here, so nothing can be compiled for a {self.name.upper()}. "
                "`make test-hardware` makes .venv-hardware, which has it; keep it out of the environment you work in."
            ) from error

    @property
    def installed(self) -> bool:
        try:
            self.versions()
        except MissingExtraError:
            return False
        return True
