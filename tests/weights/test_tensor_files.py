"""Files of tensors: what is in them, and who may read them."""

import torch
from safetensors import safe_open

from longtake.weights.tensor_files import save_tensors


def test_a_file_has_the_permissions_of_any_other_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    for _ in range(2):  # the second one replaces the first
        save_tensors({"a": torch.arange(3.0)}, tmp_path / "a.safetensors", {"format": "pt"})
        assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("a"), torch.arange(3.0)) and file.metadata() == {"format": "pt"}
