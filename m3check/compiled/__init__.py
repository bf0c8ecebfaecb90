"""Evidence by cross-compilation: each Triton launch of a case is captured and compiled for a target, without its GPU.

`target` answers as the target's driver would, `capture` takes the launches, `build` compiles each once, `figures` reads
what came out, and `findings` judges it. Nothing here computes a result. docs/compiled.md says what this shows and what not.
"""

from __future__ import annotations
