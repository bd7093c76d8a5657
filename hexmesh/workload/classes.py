"""The four classes of HexGen-2: heavy (H) or light (L) prefill (P) and decode (D).

A prompt is heavy above 512 tokens, an output above 128; the paper takes them from the Azure conversation trace. The
lengths here are lognormals fitted to each class's requests in AzureLLMInferenceTrace_conv.csv (published with
Splitwise, ISCA 2024; https://github.com/Azure/AzurePublicDataset, CC-BY), without prompts over 2,048 and outputs over
1,024 tokens, as Helix cuts it: 16,663 requests, mean 763 in and 232 out. `python -m tools.workload_classes FILE`
prints them.
"""

from __future__ import annotations

from hexmesh.workload.lengths import LognormalLengths

HEAVY_PROMPT_TOKENS = 512
HEAVY_OUTPUT_TOKENS = 128

CLASSES: dict[str, LognormalLengths] = {
    "HPLD": LognormalLengths(
        prompt=1273.9, output=80.2, prompt_cv=0.315, output_cv=0.310, correlation=-0.040
    ),
    "HPHD": LognormalLengths(
        prompt=1104.2, output=397.6, prompt_cv=0.111, output_cv=0.256, correlation=-0.474
    ),
    "LPHD": LognormalLengths(
        prompt=228.6, output=177.8, prompt_cv=0.506, output_cv=0.332, correlation=-0.154
    ),
    "LPLD": LognormalLengths(prompt=355.9, output=85.2, prompt_cv=0.261, output_cv=0.307, correlation=0.305),
}


def class_of(prompt_tokens: float, output_tokens: float) -> str:
    """The class of a request, such as "HPLD"."""
    prompt = "H" if prompt_tokens > HEAVY_PROMPT_TOKENS else "L"
    output = "H" if output_tokens > HEAVY_OUTPUT_TOKENS else "L"
    return f"{prompt}P{output}D"
