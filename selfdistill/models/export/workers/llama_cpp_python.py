"""A GGUF file in llama.cpp, through llama-cpp-python. Started by `Program`, with whatever Python has the package."""

import llama_cpp
import numpy
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from loop import serve


class Model:
    """Greedy answers, log-probabilities, and the file's own tokenizer and chat template."""

    def __init__(self, model, context_tokens):
        self.llm = llama_cpp.Llama(model, n_ctx=context_tokens, n_batch=512, logits_all=True, verbose=False)
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.llm.model)

    def version(self):
        return f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"

    def render(self, prompt, kwargs):
        """The prompt's text, of messages as the file's own chat template renders them."""
        if isinstance(prompt, str):
            return prompt
        template = self.llm.metadata["tokenizer.chat_template"]
        bos, eos = (self._text(token) for token in (self.llm.token_bos(), self.llm.token_eos()))
        formatter = Jinja2ChatFormatter(template, eos_token=eos, bos_token=bos, add_generation_prompt=True)
        return formatter(messages=prompt, **kwargs).prompt

    def encode(self, prompt, kwargs):
        text = self.render(prompt, kwargs)
        # A chat template writes its first token itself.
        return self.tokenize(text, isinstance(prompt, str), not isinstance(prompt, str))

    def tokenize(self, text, add_bos, special):
        return self.llm.tokenize(text.encode(), add_bos=add_bos and self._adds_bos(), special=special)

    def decode(self, ids):
        return self.llm.detokenize(ids, special=True).decode(errors="replace")

    def answer(self, ids, max_new_tokens):
        answer = []
        self.llm.reset()
        self.llm.eval(ids)
        while len(answer) < max_new_tokens:
            answer.append(int(numpy.argmax(self.llm.scores[self.llm.n_tokens - 1])))
            if llama_cpp.llama_vocab_is_eog(self.vocabulary, answer[-1]):
                break
            self.llm.eval(answer[-1:])
        return answer

    def score(self, ids, tail):
        self.llm.reset()
        self.llm.eval(ids)
        logits = self.llm.scores[len(ids) - tail - 1 : len(ids) - 1].astype(numpy.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        logps = logits - numpy.log(numpy.exp(logits).sum(axis=-1, keepdims=True))
        return {
            "logps": [float(row[token]) for row, token in zip(logps, ids[-tail:])],
            "likeliest": logps.argmax(-1).tolist(),
        }

    def _adds_bos(self):
        return bool(llama_cpp.llama_vocab_get_add_bos(self.vocabulary))

    def _text(self, token):
        return llama_cpp.llama_vocab_get_text(self.vocabulary, token).decode() if token >= 0 else ""


if __name__ == "__main__":
    serve(Model)
