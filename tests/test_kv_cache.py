from __future__ import annotations

import pytest
import torch

from lowvram.kv_cache import KVCache

CPU = torch.device("cpu")


def cache(max_tokens: int = 6) -> KVCache:
    return KVCache(2, 3, 4, max_tokens, dtype=torch.float32, device=CPU)


def test_update_returns_all_that_was_appended():
    kv, first, second = cache(), torch.randn(2, 1, 3, 2, 4), torch.randn(2, 1, 3, 1, 4)
    kv.update(*first, 0)
    keys, values = kv.update(*second, 0)
    torch.testing.assert_close(keys, torch.cat([first[0], second[0]], 2))
    torch.testing.assert_close(values, torch.cat([first[1], second[1]], 2))


def test_layers_are_separate():
    kv = cache()
    kv.update(torch.ones(1, 3, 2, 4), torch.ones(1, 3, 2, 4), 0)
    assert (kv.get_seq_length(0), kv.get_seq_length(1)) == (2, 0)


def test_appending_never_moves_what_is_there():
    kv = cache()
    before, _ = kv.update(torch.ones(1, 3, 2, 4), torch.ones(1, 3, 2, 4), 1)
    after, _ = kv.update(torch.ones(1, 3, 2, 4), torch.ones(1, 3, 2, 4), 1)
    assert before.data_ptr() == after.data_ptr()


def test_bytes_per_token_is_what_a_token_costs():
    assert cache(7).n_bytes == 7 * cache().bytes_per_token


def test_overflow_is_our_own_broken_arithmetic():
    with pytest.raises(AssertionError, match="7 positions in a cache of 6"):
        cache().update(torch.ones(1, 3, 7, 4), torch.ones(1, 3, 7, 4), 0)
