"""What it costs to bring a trained adapter to a vLLM engine in this process: merged into its weights, or as it is.

TRL merges: the adapter is added to the weights, every weight is copied, and the adapter is taken out again. vLLM
can also be handed the adapter, and then adds it to every layer's output while it generates. Both engines are held
against the trained model first. Run it with the Python of `make vllm`:

    .venv-vllm/bin/python experiments/benchmarks/adapter_handover.py --hidden 768 --layers 12

Prints, for each way, seconds of CPU time for a hand-over and for generating one batch, medians of several, in turn.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from selfdistill.config.schema import Vllm
from selfdistill.models.loading import resolve
from selfdistill.training.engine import COLOCATED, starting_vllm

TOKENS, PROMPTS, RANK = 32, 16, 32
HERE = Vllm("colocate", 0.3, standby=False, server_base_url=None, tensor_parallel_size=1, max_model_tokens=256)


def student(folder: Path, hidden: int, layers: int, vocabulary: int) -> Any:
    """A model of random weights, as it lies in the folder, with an adapter that does something."""
    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": 3 * hidden, "head_dim": 64}
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": max(hidden // 256, 1)}
    torch.manual_seed(0)
    ends = {"eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, **shape, **heads, **ends)).to(torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve("embedded")).save_pretrained(folder)
    model.name_or_path = str(folder)
    model.config._name_or_path = str(folder)
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return adapted


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    os.environ.update(COLOCATED)
    with tempfile.TemporaryDirectory() as folder, starting_vllm(HERE, cuda=False):
        compare(Path(folder), options)


def compare(folder: Path, options: argparse.Namespace) -> None:
    from trl.generation import vllm_generation
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    model = student(folder / "model", options.hidden, options.layers, options.vocabulary)
    common = {"max_model_length": HERE.max_model_tokens, "max_num_seqs": PROMPTS, "gpu_memory_utilization": 0.3}
    vllm_generation.LLM = partial(LLM, enforce_eager=True)  # neither engine is compiled
    merging = vllm_generation.VLLMGeneration(model, Accelerator(cpu=True), None, mode="colocate", **common)
    taking = LLM(
        model=str(folder / "model"), enable_lora=True, max_lora_rank=RANK, max_model_len=HERE.max_model_tokens,
        max_num_seqs=PROMPTS, max_num_batched_tokens=4096, logprobs_mode="processed_logprobs",
        distributed_executor_backend="external_launcher", enforce_eager=True,
    )  # fmt: skip
    request = LoRARequest("student", 1, str(folder / "adapter"), load_inplace=True)

    def hand_over() -> None:
        model.save_pretrained(folder / "adapter")
        taking.llm_engine.add_lora(request)

    prompts = [{"prompt_token_ids": [5 + row, *range(5, 25)]} for row in range(PROMPTS)]
    how = SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=0.0, logprobs=0)

    def generate(engine: Any, **adapter: Any) -> Any:
        return engine.generate(prompts, how, use_tqdm=False, **adapter)

    ways = {
        "merged": (merging.sync_weights, lambda: generate(merging.llm)),
        "as an adapter": (hand_over, lambda: generate(taking, lora_request=request)),
    }
    first = {}
    for name, (bring, sample) in ways.items():
        bring()
        answers = sample()
        first[name] = [next(iter(answer.outputs[0].logprobs[0].values())).logprob for answer in answers]
    with torch.no_grad():
        ids = torch.tensor([prompt["prompt_token_ids"] for prompt in prompts])
        own = model(ids).logits[:, -1].float().log_softmax(-1).max(dim=-1).values
    for name, values in first.items():
        apart = (torch.tensor(values) - own).abs().max()
        assert apart < 0.1, f"{name}: {apart:.3f} nats from the trained model"
        print(f"{name}: within {apart:.3f} nats of the trained model")
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, (bring, sample) in ways.items():
            taken[name].append((cpu_seconds(bring), cpu_seconds(sample)))
    count = sum(weight.numel() for weight in model.parameters())
    print(f"\n{count / 1e6:.0f}M parameters, rank {RANK}, {PROMPTS} x {TOKENS} tokens; seconds of CPU time")
    print("| way | hand-over | generation | both |\n|---|---|---|---|")
    for name, rounds in taken.items():
        bring, sample = (median(times) for times in zip(*rounds, strict=True))
        print(f"| {name} | {bring:.3f} | {sample:.3f} | {bring + sample:.3f} |")


if __name__ == "__main__":
    main()
