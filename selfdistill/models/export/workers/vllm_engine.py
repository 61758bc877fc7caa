"""A model in vLLM, with or without a LoRA adapter. Started by `Program`, with whatever Python has vLLM."""

import torch
import vllm
from loop import serve
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


class Model:
    """Greedy answers and log-probabilities."""

    def __init__(self, model, context_tokens, adapter=None, rank=16, dtype="auto"):
        settings = {"dtype": dtype, "max_model_len": context_tokens, "max_num_seqs": 4, "enforce_eager": True}
        if torch.cuda.is_available():  # of what the training process leaves free
            free, total = torch.cuda.mem_get_info()
            settings["gpu_memory_utilization"] = 0.8 * free / total
        self.lora = None
        if adapter is not None:
            settings |= {"enable_lora": True, "max_lora_rank": max(8, rank), "max_loras": 1}
            self.lora = LoRARequest("adapter", 1, adapter)
        self.llm = LLM(model=model, **settings)
        self.tokenizer = self.llm.get_tokenizer()

    def version(self):
        return f"vLLM {vllm.__version__}"

    def encode(self, prompt, kwargs):
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        text = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **kwargs)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids):
        return self.tokenizer.decode(ids)

    def answer(self, ids, max_new_tokens):
        return list(self._ask(ids, temperature=0.0, max_tokens=max_new_tokens).outputs[0].token_ids)

    def score(self, ids, tail):
        found = self._ask(ids, max_tokens=1, prompt_logprobs=1).prompt_logprobs[-tail:]
        likeliest = [min(said, key=lambda token: said[token].rank) for said in found]
        logps = [said[token].logprob for said, token in zip(found, ids[-tail:])]
        return {"logps": logps, "likeliest": likeliest}

    def _ask(self, ids, **settings):
        wanted = [{"prompt_token_ids": ids}]
        return self.llm.generate(wanted, SamplingParams(**settings), lora_request=self.lora, use_tqdm=False)[0]


if __name__ == "__main__":
    serve(Model)
