"""Licences of the weights that open_clip names."""

from __future__ import annotations

import re

# pattern of "MODEL TAG" -> licence, the first that matches; from the cards of the models
LICENCES = (
    (r"PE-Core-.* meta", "Apache-2.0"),
    (r"MobileCLIP2-.*", "apple-amlr"),
    (r".* (dfn\d\w*|datacompdr\w*)", "Apple's, see the model card"),
    (r".* (metaclip\w*)", "CC-BY-NC-4.0"),
    (r"EVA0[12]-.*", "MIT"),
    (r".* openai", "MIT"),
    (r".* (laion\w*|datacomp_\w*|commonpool_\w*)", "MIT"),
)


def licence(name: str, tag: str) -> str:
    """Return the licence of weights; "see the model card" if this table does not have it.

    Args:
        name, tag: open_clip's.
    """
    return next(
        (text for pattern, text in LICENCES if re.fullmatch(pattern, f"{name} {tag}")), "see the model card"
    )
