"""A random four-block Llama with a small real tokenizer, built on the fly: for tests and for trying the pipeline."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Literal

import torch

from steer_heal.model import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

CORPUS = """You are a helpful assistant. I feel that the answer is here and I am glad to tell you what it means.
Thank you for asking me about this; there are some things that people like to know when they start with it.
First you take the one that you need, then you put it where it should be, and that is all there is to do today.
It was a long day at work and we were not sure whether the others would come back before the evening was over."""
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Tiny(ModelConfig, key="steer_heal.model.tiny.Tiny"):
    """Random weights from a seed; the text is noise, everything else is real."""

    name: Literal["tiny"]
    init_seed: int

    def identity(self) -> str:
        model, tokenizer = self.fetch()
        digest = hashlib.sha256(f"{tokenizer.backend_tokenizer.to_str()}{TEMPLATE}".encode())  # type: ignore[attr-defined]
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def skeleton(self) -> PreTrainedModel:
        return self.fetch()[0]

    def fetch(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        from transformers import LlamaConfig, LlamaForCausalLM

        tokenizer = tiny_tokenizer()
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
            initializer_range=0.15, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None, attn_implementation=self.attn_implementation,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.init_seed)
            model = LlamaForCausalLM(config)
        return model.to(self.torch_dtype()), tokenizer


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens trained on a few sentences; the same every time."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(CORPUS.splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|pad|>", chat_template=TEMPLATE
    )
