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
    rows = torch.empty(5, 16, device="meta")
    values, indices = ops.top_k(rows, rows, 3, None)
    assert (values.shape, indices.shape, indices.dtype) == ((5, 3), (5, 3), torch.int64)
    try:
        ops.top_k(torch.eye(4), torch.eye(4), 1, None)
    except NotImplementedError:  # there is no kernel for a CPU, and none steps in
        print(f"{len(library.FAKES)} ops")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
