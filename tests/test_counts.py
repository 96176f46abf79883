"""Count models: against probabilities worked out by hand, and on sources whose entropy is known."""

import math

import numpy as np
import pytest
import soundfile

from sparse_tx.evaluation.counts import order_k_bits
from sparse_tx.evaluation.flac import flac_bits, flac_file


def codes(text):
    return np.frombuffer(text, np.uint8)


def test_order_0_is_the_smoothed_share_of_each_byte():
    # n(a) = 3, n(b) = 1, two kinds: P(x) = (n(x) + 2 / 256) / (4 + 2).
    want = -math.log2((3 + 2 / 256) / 6) - math.log2((1 + 2 / 256) / 6) - math.log2((2 / 256) / 6)
    assert order_k_bits(codes(b"aaab"), codes(b"abz"), 0) == pytest.approx(want / 3)


def test_order_1_backs_off_to_order_0():
    below = {x: (n + 2 / 256) / 6 for x, n in ((ord("a"), 2), (ord("b"), 2))}  # of "abab"
    p_a = below[ord("a")]  # the first byte has no context
    p_b_after_a = (2 + 1 * below[ord("b")]) / (2 + 1)
    want = -math.log2(p_a) - math.log2(p_b_after_a)
    assert order_k_bits(codes(b"abab"), codes(b"ab"), 1) == pytest.approx(want / 2)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_uniform_bytes_cost_about_eight_bits_and_never_infinity(k):
    data = np.random.default_rng(0).integers(256, size=200_000, dtype=np.uint8)
    assert 7.9 < order_k_bits(data[:100_000], data[100_000:], k) < 9


def test_a_chain_of_order_2_is_found_by_order_2_alone():
    # x_t = x_(t-1) xor x_(t-2), with one bit in 16 drawn anew: 2 bits of noise entropy a byte over 4 symbols.
    generator = np.random.default_rng(0)
    x = np.zeros(200_000, np.uint8)
    fresh, noise = generator.random(len(x)) < 1 / 16, generator.integers(4, size=len(x))
    for t in range(2, len(x)):
        x[t] = noise[t] if fresh[t] else x[t - 1] ^ x[t - 2]
    bits = [order_k_bits(x[:150_000], x[150_000:], k) for k in (0, 1, 2)]
    p = 15 / 16 + 1 / 64
    entropy = -p * math.log2(p) - 3 / 64 * math.log2(1 / 64)
    assert bits[0] > 1.9
    assert bits[1] > 1.9
    assert bits[2] == pytest.approx(entropy, abs=0.02)


def test_chunks_do_not_change_the_result(monkeypatch):
    data = np.random.default_rng(0).integers(5, size=5000, dtype=np.uint8)
    whole = order_k_bits(data[:4000], data[4000:], 2)
    monkeypatch.setattr("sparse_tx.evaluation.counts.CHUNK", 97)
    assert order_k_bits(data[:4000], data[4000:], 2) == pytest.approx(whole, rel=1e-12)


def test_flac_takes_all_bits_of_noise_and_few_of_a_tone():
    noise = np.random.default_rng(0).integers(0, 256, 50_000).astype(np.uint8)
    tone = (128 + 100 * np.sin(np.arange(50_000) / 50)).astype(np.uint8)
    assert flac_bits(noise) == pytest.approx(8.0, abs=0.1)
    assert flac_bits(tone) < 2
    assert soundfile.read(flac_file(noise), dtype="int16")[0].tolist() == ((noise.astype(int) - 128) << 8).tolist()
