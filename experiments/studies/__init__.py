"""The parts of `kvjax study`: one module per paper, over the shared modules study, claim, planted, measure and page."""
