"""Every test runs with shapes and types checked: jaxtyping's annotations, enforced by beartype."""

from jaxtyping import install_import_hook

install_import_hook("minilm", "beartype.beartype")
