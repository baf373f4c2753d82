"""Load a CUDA library and ask its ops for shapes, as torch.compile does: no GPU is needed for that.

Run by test_cuda.py in a process of its own.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from discovla.ops.cuda import library


def main(path: Path) -> None:
    library.LIBRARY = path
    assert library.missing() == "", library.missing()
    ops = library.ops()
    rows, parts = torch.empty(5, 16, device="meta"), torch.empty(3, 2, 16, device="meta")
    positive = torch.empty(5, dtype=torch.int64, device="meta")
    ranks = ops.rank_of_positive(rows, rows, positive, None, None, None, None, 1.0)
    assert (ranks.shape, ranks.dtype) == ((2, 5), torch.int32)
    values, indices = ops.top_k(rows, rows, 3, None)
    assert (values.shape, indices.shape, indices.dtype) == ((5, 3), (5, 3), torch.int64)
    scale = torch.empty((), device="meta")
    kept = ops.frame_similarity(parts, parts, scale, None, None, True)
    assert [tuple(x.shape) for x in kept] == [(3, 3), (3, 2, 3), (3, 2, 3), (3, 3, 2), (3, 3, 2), (5, 3, 3)]
    derivative = ops.frame_similarity_backward(kept[0], parts, parts, scale, None, None, *kept[1:])
    assert derivative.shape == (6, 6)
    try:
        ops.top_k(torch.eye(4), torch.eye(4), 1, None)
    except NotImplementedError:  # there is no kernel for a CPU, and none steps in
        print(f"{len(library.FAKES)} ops")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
