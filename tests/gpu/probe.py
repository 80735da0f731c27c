"""Print as JSON what torch finds of the GPU, and how far NF4 is from what it quantised there."""

import json

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

cuda = torch.cuda.is_available()
torch.manual_seed(0)
weights = torch.randn(896, 896, device="cuda" if cuda else "cpu")
packed, state = quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
error = (dequantize_4bit(packed, state) - weights).abs().max() / weights.abs().max()
found = {"cuda": cuda, "torch": torch.__version__, "nf4_error": error.item()}
if cuda:
    found["name"] = torch.cuda.get_device_name()
    found["cuda_version"] = torch.version.cuda
    found["free_bytes"], found["total_bytes"] = torch.cuda.mem_get_info()
    found["bfloat16"] = torch.cuda.is_bf16_supported(including_emulation=False)
print(json.dumps(found))
