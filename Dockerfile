# The set for an NVIDIA GPU, and this checkout, without weights: they come from the Hugging Face Hub at run time.
#   docker build -t lora-grpo .
#   docker run --rm --gpus all --ipc=host -v "$PWD/adapters:/work/adapters" \
#     -v "$HOME/.cache/huggingface:/cache/huggingface" lora-grpo train --preset qwen2.5-0.5b
# torch's wheels bring their own CUDA libraries; the host needs the driver and the NVIDIA container toolkit. vLLM's kernels are
# compiled at run time, for which the image has a C compiler.
FROM python:3.12-slim-bookworm

# For Triton and torch.compile. Debian keeps only the newest version of a package, so none is pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ \
    && rm -rf /var/lib/apt/lists/*

ENV HF_HOME=/cache/huggingface \
    PYTHONUNBUFFERED=1

WORKDIR /opt/lora-grpo

# First what changes seldom, so that a change of the code keeps the layer of 10 GB.
COPY requirements.txt requirements-cpu.txt constraints.txt ./
RUN pip install --no-cache-dir -r requirements.txt

COPY pyproject.toml README.md LICENSE ./
COPY lora_grpo ./lora_grpo
RUN pip install --no-cache-dir --no-deps .

# Where adapters/, merged/ and exports/ are written; mount a folder to keep them.
WORKDIR /work
ENTRYPOINT ["lora-grpo"]
CMD ["doctor"]
