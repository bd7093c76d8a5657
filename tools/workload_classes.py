"""Prints the lengths of HexGen-2's four classes, fitted to a trace: `python -m tools.workload_classes TRACE.csv`.

The figures in hexmesh/workload/classes.py are of AzureLLMInferenceTrace_conv.csv.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hexmesh.workload import class_of, fit_lognormal, read_trace

MAX_PROMPT_TOKENS, MAX_OUTPUT_TOKENS = 2048, 1024
"""Helix's cut."""


def main() -> None:
    path = Path(sys.argv[1])
    pairs = [
        (prompt, output)
        for prompt, output in read_trace(path.read_text(encoding="utf-8"), path.name).pairs
        if 0 < prompt <= MAX_PROMPT_TOKENS and 0 < output <= MAX_OUTPUT_TOKENS
    ]
    for name in ("HPLD", "HPHD", "LPHD", "LPLD"):
        own = [pair for pair in pairs if class_of(*pair) == name]
        fitted = fit_lognormal(own)
        print(
            f"{name}: {len(own)} requests, prompt={fitted.prompt:.1f}, output={fitted.output:.1f}, "
            f"prompt_cv={fitted.prompt_cv:.3f}, output_cv={fitted.output_cv:.3f}, "
            f"correlation={fitted.correlation:.3f}, mean context {fitted.mean_context:.0f}"
        )


if __name__ == "__main__":
    main()
