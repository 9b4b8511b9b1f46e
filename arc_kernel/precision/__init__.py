"""No model ever answers with NaN, and the fast dtype is kept: docs/precision.md.

`probe` measures how large every activation gets; `rescale` shifts by powers of two, exactly, what float16 cannot hold;
`verdict` orders the dtypes and judges a model's first answers. Nothing here knows engines or training.
"""
