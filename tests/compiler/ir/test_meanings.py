"""The NumPy meanings against PyTorch and Transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.bloom.modeling_bloom import bloom_gelu_forward
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from belle_compile.compiler.ir import meanings
from belle_compile.compiler.ir.cache import PagedCache

torch.set_num_threads(1)
RANDOM = np.random.default_rng(11)


def floats(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * RANDOM.standard_normal(shape)).astype(np.float32)


def test_norms() -> None:
    x, scale, bias = floats(5, 32, scale=3), floats(32), floats(32)
    tensors = [torch.from_numpy(array) for array in (x, scale, bias)]
    for expected, found in (
        (torch.nn.functional.layer_norm(tensors[0], (32,), tensors[1], tensors[2], 1e-3),
         meanings.layer_norm(x, scale, bias, epsilon=1e-3)),
        (torch.nn.functional.layer_norm(tensors[0], (32,), tensors[1], None, 1e-3),
         meanings.layer_norm(x, scale, None, epsilon=1e-3)),
        (torch.nn.functional.rms_norm(tensors[0], (32,), tensors[1], 1e-3), meanings.rms_norm(x, scale, epsilon=1e-3)),
        (torch.nn.functional.rms_norm(tensors[0].view(-1, 4, 8), (8,), tensors[1][:8], 1e-3).flatten(1),
         meanings.head_norm(x, scale[:8], epsilon=1e-3)),
    ):  # fmt: skip
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected.numpy(), rtol=2e-6, atol=1e-6)


def test_activations() -> None:
    x, y = floats(4, 64, scale=4), floats(4, 64)
    x[0, :2] = -200, 200  # exp overflows
    tensor = torch.from_numpy(x)
    np.testing.assert_allclose(meanings.gelu(x), bloom_gelu_forward(tensor).numpy(), rtol=1e-5, atol=1e-6)
    expected = torch.nn.functional.silu(tensor) * torch.from_numpy(y)
    np.testing.assert_allclose(meanings.swiglu(x, y), expected.numpy(), rtol=1e-5, atol=1e-6)
    assert meanings.gelu(x).dtype == meanings.swiglu(x, y).dtype == np.float32


def test_quantize_tokens() -> None:
    x = np.array([[0, 0, 0], [127, -126.5, 0.5], [1, -2, 0.25]], np.float32)
    xq, xs = meanings.quantize_tokens(x)
    assert xq.tolist() == [[0, 0, 0], [127, -126, 0], [64, -127, 16]]  # halves go to even: 63.5 to 64
    np.testing.assert_array_equal(xs, np.array([0, 1, np.float32(2) / np.float32(127)], np.float32))
    assert xq.dtype == np.int8 and xs.dtype == np.float32


def test_quantize_tokens_with_one_step_for_all() -> None:
    x, step = np.array([[0, 0.25, -0.75], [100, -100, 63.5]], np.float32), np.array([0.5], np.float32)
    xq, xs = meanings.quantize_tokens(x, step)
    assert xq.tolist() == [[0, 0, -2], [127, -127, 127]]  # halves go to even; beyond 127 steps is clipped
    np.testing.assert_array_equal(xs, [0.5, 0.5])
    for found in (meanings.gelu_quantize(x, step), meanings.swiglu_quantize(x, x, step)):
        np.testing.assert_array_equal(found[1], [0.5, 0.5])


def test_quantize_tokens_to_16_bits() -> None:
    limit = meanings.LIMITS[16]
    x = np.array([[0, 0, 0], [limit, -limit, 0.5], [1, -2, 1e-5]], np.float32)
    xq, xs = meanings.quantize_tokens(x, bits=16)
    assert xq.tolist() == [[0, 0, 0], [limit, -limit, 0], [16320, -limit, 0]]  # 16319.5 goes to even
    np.testing.assert_array_equal(xs, np.array([0, 1, np.float32(2) / np.float32(limit)], np.float32))
    assert xq.dtype == np.int16 and xs.dtype == np.float32


def test_16_bits_are_two_bytes_and_sums_are_exact() -> None:
    limit, most = meanings.LIMITS[16], meanings.MAX_INPUTS[16]
    for value in (limit, -limit):
        high = (value + 128) // 256
        assert -127 <= high <= 127 and -128 <= value - 256 * high <= 127
    assert (limit + 1 + 128) // 256 == 128, "the largest such range"
    xq, wq = np.full((1, most), -limit, np.int16), np.full((1, most), 127, np.int8)
    found = meanings.integer_linear(xq, wq)
    assert found.dtype == np.int64 and found.tolist() == [[-limit * 127 * most]]
    one = np.ones(1, np.float32)
    assert meanings.dequantize(found, one, one, None)[0, 0] == np.float32(-limit * 127 * most)


def test_integer_linear_is_exact_at_the_extremes() -> None:
    xq, wq = np.full((2, 20000), -127, np.int8), np.full((3, 20000), 127, np.int8)
    wq[1] = -127
    found = meanings.integer_linear(xq, wq)
    assert found.dtype == np.int32 and found[0].tolist() == [-(127**2) * 20000, 127**2 * 20000, -(127**2) * 20000]
    xq, wq = (RANDOM.integers(-127, 128, (7, 100)).astype(np.int8) for _ in range(2))
    np.testing.assert_array_equal(meanings.integer_linear(xq, wq), xq.astype(np.int64) @ wq.astype(np.int64).T)


def test_quantized_ops_are_their_parts() -> None:
    xq, xs = meanings.quantize_tokens(floats(4, 16))
    wq, ws = meanings.quantize_tokens(floats(8, 16))
    bias = floats(8)
    expected = (xq.astype(np.int64) @ wq.astype(np.int64).T).astype(np.float32) * ws[None] * xs[:, None] + bias
    np.testing.assert_array_equal(meanings.quantized_linear(xq, xs, wq, ws, bias), expected)
    np.testing.assert_array_equal(meanings.quantized_embedding(np.array([3, 3, 0], np.int32), wq, ws)[2], wq[0] * ws[0])


@pytest.mark.parametrize(("width", "block"), [(48, 16), (64, 64), (1536, 512)])
def test_block_hadamard(width: int, block: int) -> None:
    """The matrix, written out: signs, then (-1)**(number of ones that two indices share in binary) / sqrt(block)."""
    ones = np.array([[bin(i & j).count("1") for i in range(block)] for j in range(block)])
    neighbours = np.array([bin(i & i >> 1).count("1") for i in range(block)])
    signs = (-1.0) ** neighbours
    np.testing.assert_array_equal(meanings.golay_signs(block), signs)
    matrix = np.kron(np.eye(width // block), signs[:, None] * (-1.0) ** ones / block**0.5)
    x, weight = floats(5, width), floats(7, width)
    found = meanings.block_hadamard(x, block=block)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, x @ matrix, rtol=0, atol=2e-6)
    product = found @ meanings.block_hadamard(weight, block=block).T
    np.testing.assert_allclose(product, x @ weight.T, rtol=0, atol=1e-4)


def test_block_hadamard_gathers_nothing_in_one_channel() -> None:
    """Neither one outlier nor the mean of a row, which a Hadamard matrix alone would put into its first channel."""
    outlier, mean = np.zeros((1, 512), np.float32), np.ones((1, 512), np.float32)
    outlier[0, 17] = 1
    assert np.abs(meanings.block_hadamard(outlier, block=512)).max() == pytest.approx(512**-0.5)
    assert np.abs(meanings.block_hadamard(mean, block=512)).max() == pytest.approx(2**0.5)


def test_activations_are_rotated_before_they_are_quantized() -> None:
    x, up = floats(4, 96), floats(4, 96)
    for bits in (8, 16):
        for found, activated in (
            (meanings.gelu_quantize(x, bits=bits, hadamard=32), meanings.gelu(x)),
            (meanings.swiglu_quantize(x, up, bits=bits, hadamard=32), meanings.swiglu(x, up)),
        ):
            expected = meanings.quantize_tokens(meanings.block_hadamard(activated, block=32), bits=bits)
            for one, other in zip(found, expected, strict=True):
                np.testing.assert_array_equal(one, other)


def rotary(positions: list[int], sequences: list[int], config: LlamaConfig) -> tuple[np.ndarray, np.ndarray]:
    """(found, expected) [T, D]; Transformers sees each sequence alone, as a step's batch of one."""
    module = LlamaRotaryEmbedding(config)
    parameters = config.rope_parameters
    dynamic = parameters["rope_type"] == "dynamic"
    found = meanings.rotary_table(
        np.array(positions, np.int32),
        np.array(sequences, np.int32),
        module.original_inv_freq.numpy().copy(),
        attention_scaling=module.attention_scaling,
        dynamic_factor=parameters["factor"] if dynamic else 0.0,
        original_max=config.max_position_embeddings,
        base=parameters["rope_theta"],
    )
    half = found.shape[1] // 2
    expected = np.empty_like(found)
    for sequence in set(sequences):
        rows = [row for row, other in enumerate(sequences) if other == sequence]
        ids = torch.tensor([[positions[row] for row in rows]])
        cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), ids)
        expected[rows] = torch.cat([cos[0, :, :half], sin[0, :, :half]], -1).numpy()
    return found, expected


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 8.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ],
)
def test_rotary_table(scaling: dict[str, object]) -> None:
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=16, rope_parameters={"rope_theta": 10000.0, **scaling}
    )
    # lengths below, at and above the 16 positions of the model, of several sequences in one step
    positions, sequences = [*range(20), *range(16), 5, 40], [0] * 20 + [1] * 16 + [2, 3]
    found, expected = rotary(positions, sequences, config)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=4e-6)
    if scaling["rope_type"] == "dynamic":
        static, _ = rotary(positions, sequences, LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=64))
        assert np.abs(found[:20] - static[:20]).max() > 0.1
        np.testing.assert_allclose(found[20:36], static[20:36], rtol=0, atol=1e-6)


def test_rotate() -> None:
    x, angles = floats(3, 2, 8), floats(3, 4)
    table = np.concatenate([np.cos(angles), np.sin(angles)], -1)
    cos, sin = (torch.from_numpy(np.concatenate([part, part], -1)) for part in (np.cos(angles), np.sin(angles)))
    tensor = torch.from_numpy(x)
    expected, _ = apply_rotary_pos_emb(tensor, tensor, cos, sin)
    np.testing.assert_allclose(meanings.rotate(x, table), expected.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("alibi", "window"), [(False, 0), (True, 0), (False, 1), (True, 7)])
def test_attention(kv_heads: int, alibi: bool, window: int) -> None:
    """Two sequences, tokens interleaved, in two steps, against PyTorch's attention of each whole sequence."""
    heads, dim, lengths = 4, 8, (19, 6)
    slopes = np.array([0.5, 0.25, 0.125, 0.0625], np.float32) if alibi else None
    q = [floats(length, heads, dim) for length in lengths]
    k, v = ([floats(length, kv_heads, dim) for length in lengths] for _ in range(2))
    cache = PagedCache(2, kv_heads, dim, num_blocks=4)
    table = np.array([[2, 0], [3, -1]], np.int32)
    found = [np.empty((length, heads, dim), np.float32) for length in lengths]
    everything = [(s, p) for p in range(max(lengths)) for s in range(2) if p < lengths[s]]
    for step in (everything[:17], everything[17:24], everything[24:]):
        result = meanings.attention(
            *(np.stack([part[s][p].reshape(-1) for s, p in step]) for part in (q, k, v)),
            np.array([p for _, p in step], np.int32), np.array([s for s, _ in step], np.int32), table, None, slopes,
            cache=cache, layer=1, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, scale=0.3,
            window=window,
        )  # fmt: skip
        for (s, p), row in zip(step, result, strict=True):
            found[s][p] = row.reshape(heads, dim)
    for s, length in enumerate(lengths):
        tensors = [torch.from_numpy(part[s]).transpose(0, 1)[None] for part in (q, k, v)]
        mask = torch.full((length, length), -torch.inf).triu(1).repeat(heads, 1, 1)
        if window:
            apart = torch.arange(length)[:, None] - torch.arange(length)
            mask = mask.masked_fill(apart >= window, -torch.inf)
        if slopes is not None:
            mask = mask + torch.from_numpy(slopes)[:, None, None] * torch.arange(length)
        expected = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask[None], scale=0.3, enable_gqa=True)
        np.testing.assert_allclose(found[s], expected[0].transpose(0, 1).numpy(), rtol=0, atol=2e-6)
    assert np.isnan(cache.k[0]).all() and np.isnan(cache.k[1, 1]).all()  # another layer, a block of no sequence


def test_reading_a_slot_never_written_shows() -> None:
    cache = PagedCache(1, 1, 4, num_blocks=1)
    one = floats(1, 4)
    result = meanings.attention(
        one, one, one, np.array([3], np.int32), np.array([0], np.int32), np.array([[0]], np.int32), None, None,
        cache=cache, layer=0, num_heads=1, num_kv_heads=1, head_dim=4, scale=1.0,
    )  # fmt: skip
    assert np.isnan(result).all()


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("float16", 2**-11), ("int8", 0.5 / 127)])
def test_what_a_cache_gives_back_is_rounded_to_its_type(dtype: str, error: float) -> None:
    cache, k, v = PagedCache(1, 2, 8, num_blocks=2, dtype=dtype), floats(20, 2, 8), floats(20, 2, 8)
    k[3, 1] = 0
    blocks = np.array([1, 0], np.int32)
    for position in range(20):
        cache.write(0, blocks, position, k[position], v[position])
    for found, given in zip(cache.read(0, blocks, 20), (k, v), strict=True):
        expected = given.transpose(1, 0, 2)
        bound = error * np.abs(expected).max(axis=-1, keepdims=True) * 1.0001
        assert found.dtype == np.float32 and (np.abs(found - expected) <= bound).all()
        assert np.array_equal(found, expected) == (dtype == "float32")
