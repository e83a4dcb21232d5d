"""Named attention shapes, shared by tests and benchmarks."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionCase:
    """A shape, and what its queries may see.

    Attributes:
      name: Shown in tests and benchmarks.
      batch: Rows.
      tokens: Keys in a row.
      heads: Query heads.
      kv_heads: Key and value heads.
      head_size: Of each head.
      documents: Lengths of the documents of every row, the rest is padding; row b
        has its first document cut by b tokens. Empty if rows are not packed.
      decoded: Queries are the last so many tokens of the row; 0 for all tokens.
      window: Tokens seen, or None.
      softcap: Of the scores, or None.
    """

    name: str
    batch: int = 2
    tokens: int
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 16
    documents: tuple[int, ...] = ()
    decoded: int = 0
    window: int | None = None
    softcap: float | None = None

    @property
    def q_shape(self) -> tuple[int, int, int, int]:
        """Of the queries."""
        queries = self.decoded or self.tokens
        return (self.batch, queries, self.heads, self.head_size)

    @property
    def k_shape(self) -> tuple[int, int, int, int]:
        """Of the keys and of the values."""
        return (self.batch, self.tokens, self.kv_heads, self.head_size)

    def arrays(
        self, dtype: jax.typing.DTypeLike, *, seed: int = 0
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns random q, k, v; scores spread enough for softmax to matter."""
        rng = np.random.default_rng(seed)
        q, k, v = (
            jnp.asarray(rng.normal(size=shape).astype(np.float32))
            for shape in (self.q_shape, self.k_shape, self.k_shape)
        )
        return (2 * q).astype(dtype), k.astype(dtype), v.astype(dtype)

    def options(self) -> dict[str, object]:
        """Returns the keyword arguments of the call."""
        options: dict[str, object] = {"window": self.window, "softcap": self.softcap}
        ids = self.segment_ids()
        if ids is not None:
            options |= {"segment_ids": ids, "max_segments": len(self.documents)}
        if self.decoded:
            index = np.arange(self.tokens - self.decoded, self.tokens, dtype=np.int32)
            options["q_index"] = jnp.broadcast_to(index, (self.batch, self.decoded))
            if ids is not None:
                options["q_segment_ids"] = ids[:, -self.decoded :]
        return options

    def segment_ids(self) -> jax.Array | None:
        """Returns 1, 2, .. for the documents of each row, 0 for padding."""
        if not self.documents:
            return None
        ids = np.zeros((self.batch, self.tokens), np.int32)
        for row in range(self.batch):
            lengths = (self.documents[0] - row, *self.documents[1:])
            numbers = np.repeat(np.arange(1, len(lengths) + 1), lengths)
            ids[row, : len(numbers)] = numbers
        return jnp.asarray(ids)

    def visible_pairs(self) -> int:
        """Returns how many pairs of a query and a key the rows have, for one head."""
        ids = self.segment_ids()
        rows = np.ones((self.batch, self.tokens)) if ids is None else np.asarray(ids)
        total = 0
        for row in rows:
            for document in np.unique(row[row > 0]):
                seen = np.arange(1, np.count_nonzero(row == document) + 1)
                total += int(np.minimum(seen, self.window or self.tokens).sum())
        return total


CASES = (
    AttentionCase(name="one_token", batch=1, tokens=1),
    AttentionCase(name="odd", tokens=37, head_size=20),
    AttentionCase(name="multi_query", tokens=24, heads=6, kv_heads=1, head_size=64),
    AttentionCase(name="packed", tokens=48, documents=(11, 5, 23)),
    AttentionCase(name="padded", tokens=33, documents=(20,)),
    AttentionCase(name="window", tokens=40, window=7),
    AttentionCase(name="softcap", tokens=40, softcap=3.0),
    AttentionCase(name="decode", tokens=29, decoded=1),
    AttentionCase(name="decode_packed", tokens=29, decoded=3, documents=(9, 20)),
    AttentionCase(name="tiles", batch=1, tokens=1100, heads=2, kv_heads=1, head_size=8),
    AttentionCase(
        name="tiles_window_softcap",
        batch=1,
        tokens=1537,
        heads=1,
        kv_heads=1,
        head_size=8,
        window=300,
        softcap=5.0,
    ),
    AttentionCase(
        name="tiles_packed",
        tokens=1100,
        heads=2,
        kv_heads=1,
        head_size=8,
        documents=(5, 530, 10, 500),
    ),
)
"""Small enough for a CPU; the `tiles` cases need more than one tile."""

INTERPRETED_CASES = (
    AttentionCase(
        name="packed_odd", batch=1, tokens=100, head_size=64, documents=(60, 30)
    ),
    AttentionCase(
        name="window_softcap",
        batch=1,
        tokens=256,
        heads=1,
        kv_heads=1,
        head_size=80,
        window=70,
        softcap=3.0,
    ),
    AttentionCase(
        name="softcap_odd_groups",
        batch=1,
        tokens=128,
        heads=6,
        kv_heads=2,
        head_size=64,
        documents=(70, 40),
        softcap=3.0,
    ),
    AttentionCase(
        name="softcap_padded_blocks",
        batch=1,
        tokens=256,
        heads=1,
        kv_heads=1,
        head_size=128,
        documents=(100,),
        softcap=3.0,
    ),
    AttentionCase(
        name="keys_not_shared",
        batch=1,
        tokens=256,
        heads=2,
        kv_heads=2,
        head_size=128,
        window=60,
    ),
    AttentionCase(
        name="wide",
        batch=1,
        tokens=128,
        heads=2,
        kv_heads=1,
        head_size=256,
        window=70,
    ),
)
"""Small ones that the Hopper kernels can run."""

GPU_CASES = (
    AttentionCase(name="llama3_8b", tokens=4096, heads=32, kv_heads=8, head_size=128),
    AttentionCase(name="llama3_1b", tokens=2048, heads=32, kv_heads=8, head_size=64),
    AttentionCase(name="uneven_length", tokens=1022, heads=8, kv_heads=2, head_size=64),
    AttentionCase(name="llama2_7b", tokens=1022, heads=32, kv_heads=32, head_size=128),
    AttentionCase(
        name="llama3_8b_padded",
        tokens=2048,
        heads=32,
        kv_heads=8,
        head_size=128,
        documents=(1500,),
    ),
    AttentionCase(
        name="llama3_8b_packed",
        tokens=4096,
        heads=32,
        kv_heads=8,
        head_size=128,
        documents=(700, 33, 1500, 256, 1024),
    ),
    AttentionCase(
        name="mistral_7b_window",
        tokens=4096,
        heads=32,
        kv_heads=8,
        head_size=128,
        window=1024,
    ),
)
"""Real shapes, all of which "cudnn" takes in bf16 on compute capability 9.0."""

_LARGE_CASES = (
    AttentionCase(name="llama3_8b", tokens=4096, heads=32, kv_heads=8, head_size=128),
    AttentionCase(
        name="llama3_8b_4_documents",
        tokens=4096,
        heads=32,
        kv_heads=8,
        head_size=128,
        documents=(1024,) * 4,
    ),
    AttentionCase(
        name="llama3_8b_16_documents",
        tokens=4096,
        heads=32,
        kv_heads=8,
        head_size=128,
        documents=(256,) * 16,
    ),
    AttentionCase(
        name="llama3_8b_window",
        tokens=4096,
        heads=32,
        kv_heads=8,
        head_size=128,
        window=1024,
    ),
    AttentionCase(
        name="llama3_8b_softcap",
        tokens=4096,
        heads=32,
        kv_heads=8,
        head_size=128,
        softcap=50.0,
    ),
    AttentionCase(
        name="llama3_8b_32k",
        batch=1,
        tokens=32768,
        heads=32,
        kv_heads=8,
        head_size=128,
    ),
    AttentionCase(name="llama3_1b", tokens=4096, heads=32, kv_heads=8, head_size=64),
    AttentionCase(name="phi2", tokens=2048, heads=32, kv_heads=32, head_size=80),
    AttentionCase(name="phi3_mini", tokens=4096, heads=32, kv_heads=32, head_size=96),
    AttentionCase(name="gemma3_4b", tokens=4096, heads=8, kv_heads=4, head_size=256),
    AttentionCase(
        name="gemma2_9b",
        tokens=4096,
        heads=16,
        kv_heads=8,
        head_size=256,
        softcap=50.0,
    ),
    AttentionCase(
        name="gemma2_9b_window",
        tokens=4096,
        heads=16,
        kv_heads=8,
        head_size=256,
        window=2048,
        softcap=50.0,
    ),
    AttentionCase(
        name="llama3_1b_16_documents",
        tokens=4096,
        heads=32,
        kv_heads=8,
        head_size=64,
        documents=(256,) * 16,
    ),
    AttentionCase(
        name="phi2_8_documents",
        tokens=2048,
        heads=32,
        kv_heads=32,
        head_size=80,
        documents=(256,) * 8,
    ),
    AttentionCase(
        name="phi3_mini_16_documents",
        tokens=4096,
        heads=32,
        kv_heads=32,
        head_size=96,
        documents=(256,) * 16,
    ),
    AttentionCase(
        name="phi3_mini_window",
        tokens=4096,
        heads=32,
        kv_heads=32,
        head_size=96,
        window=2047,
    ),
    AttentionCase(
        name="gemma3_4b_16_documents",
        tokens=4096,
        heads=8,
        kv_heads=4,
        head_size=256,
        documents=(256,) * 16,
    ),
    AttentionCase(
        name="gemma3_4b_window",
        tokens=4096,
        heads=8,
        kv_heads=4,
        head_size=256,
        window=1024,
    ),
    AttentionCase(
        name="llama3_8b_softcap_16_documents",
        tokens=4096,
        heads=32,
        kv_heads=8,
        head_size=128,
        documents=(256,) * 16,
        softcap=50.0,
    ),
    AttentionCase(
        name="gemma2_9b_16_documents",
        tokens=4096,
        heads=16,
        kv_heads=8,
        head_size=256,
        documents=(256,) * 16,
        softcap=50.0,
    ),
)

LARGE_CASES = (
    *_LARGE_CASES,
    *(
        replace(
            case,
            name=f"{case.name}_documents_window",
            documents=(case.tokens // 2,) * 2,
            window=case.tokens // 4,
        )
        for case in _LARGE_CASES
        if case.batch > 1 and not case.documents and case.window is None
    ),
)
"""What is compiled without a GPU, timed, and what defaults are chosen by."""
