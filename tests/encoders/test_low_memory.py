"""What `low_memory` changes is where weights and features lie, and when they are there; never a result."""

import threading

import pytest
import torch
from test_wan_vae import library_vae
from toy_assets import random_encoders

from longtake.encoders.condition import condition_frames
from longtake.encoders.offload import StreamedLinear, offload
from longtake.encoders.vae import VideoVAE
from longtake.encoders.wan_vae import WanEncoder

torch.set_num_threads(1)
PROMPTS = ["a red circle", "a blue square climbs quickly and stops"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_offloaded_encoders_give_the_same_numbers(device):
    whole, spared = random_encoders(0), random_encoders(0)
    for encoders in (whole, spared):
        encoders.text.model.to(device)
        encoders.image.model.to(device)
    names = {name: tensor.clone() for name, tensor in spared.text.model.state_dict().items()}
    picture = torch.rand(2, 3, 40, 72, generator=torch.Generator().manual_seed(0)) * 2 - 1
    spared.offload(torch.device(device))
    for _ in range(3):  # from the second call on matrices are sent ahead
        assert torch.equal(spared.text.encode(PROMPTS), whole.text.encode(PROMPTS))
        assert torch.equal(spared.image.encode(picture), whole.image.encode(picture))
    for encoder in (spared.text, spared.image):
        assert encoder.device.type == device
        lines = [module for module in encoder.model.modules() if isinstance(module, StreamedLinear)]
        assert len(lines) > 5 and not any(isinstance(module, torch.nn.Linear) for module in encoder.model.modules())
        assert all(line.weight.device.type == "cpu" for line in lines)
    after = spared.text.model.state_dict()
    assert after.keys() == names.keys() and all(torch.equal(after[name].cpu(), names[name].cpu()) for name in names)


def test_calls_of_several_threads_do_not_mix():
    whole, spared = random_encoders(0), random_encoders(0)
    spared.offload(torch.device("cpu"))
    wanted, got = [whole.text.encode([prompt]) for prompt in PROMPTS], {}

    def work(index):
        got[index] = [spared.text.encode([PROMPTS[index]]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, wanted[index]) for index in range(2) for one in got[index])


def test_a_call_that_fails_leaves_the_line_usable():
    network = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 3, bias=False), torch.nn.Linear(3, 2))
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    wanted = network(x)
    line = offload(network, torch.device("cpu"))
    with line:
        assert torch.equal(network(x), wanted)
    with pytest.raises(RuntimeError), line:
        network(torch.randn(4, 7))
    with line:
        assert torch.equal(network(x), wanted)


@pytest.mark.parametrize("layout", ["wan2.1", "wan2.2"])
def test_a_vae_works_on_less_at_a_time(layout):
    module = library_vae(layout)
    whole, spared = VideoVAE(module), VideoVAE(module, latents_per_call=1, low_memory=True)
    side = whole.spatial_stride
    clip = torch.rand(
        1, 1 + 3 * whole.temporal_stride, 3, 2 * side, 3 * side, generator=torch.Generator().manual_seed(0)
    )
    z = whole.encode(clip * 2 - 1)
    torch.testing.assert_close(spared.encode(clip * 2 - 1), z, rtol=0, atol=1e-5)
    torch.testing.assert_close(spared.decode(z), whole.decode(z), rtol=0, atol=1e-5)
    assert spared.decoder.finest_frames == 1 and spared.encoder.finest_frames == 1
    assert spared.encoder._beginning() == {"wan2.1": 2, "wan2.2": 1}[layout]
    assert WanEncoder(library_vae("time first"))._beginning() == 0  # pairs of frames must not be parted


@pytest.mark.parametrize("layout", ["wan2.1", "wan2.2"])
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_the_encoder_can_begin_with_any_number_of_frames(layout, frames):
    module = library_vae(layout)
    side = 8 * (module.config.patch_size or 1)
    clip = torch.rand(2, 9, 3, side, 2 * side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    made = []
    for encoder in (WanEncoder(module), WanEncoder(module, frames)):
        first, past = encoder(clip[:, :1], encoder.new_past(), first=True)
        rest, past = encoder(clip[:, 1:], past, first=False)
        made.append([first, rest, *(kept for kept in past if kept is not None)])
    for whole, spared in zip(*made, strict=True):
        torch.testing.assert_close(spared, whole, rtol=0, atol=1e-5)


def test_y_is_the_same_and_its_decoder_is_not_there():
    module = library_vae("wan2.1")
    whole, spared = VideoVAE(module), VideoVAE(library_vae("wan2.1"), latents_per_call=1, low_memory=True)
    picture = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    names = set(spared.tensors())
    spared.encodes_only()
    torch.testing.assert_close(condition_frames(spared, picture), condition_frames(whole, picture), rtol=0, atol=1e-5)
    assert set(spared.tensors()) == names


@pytest.mark.gpu
def test_on_a_gpu_little_is_there():
    spared = random_encoders(0)
    held = torch.cuda.memory_allocated()
    spared.offload(torch.device("cuda"))
    spared.text.encode(PROMPTS)
    matrices = [m.weight for m in spared.text.model.modules() if isinstance(m, StreamedLinear)]
    assert all(weight.is_pinned() for weight in matrices)
    table = spared.text.model.get_input_embeddings().weight
    assert table.device.type == "cpu"
    assert torch.cuda.memory_allocated() - held < sum(weight.nbytes for weight in matrices) / 2


@pytest.mark.gpu
def test_on_a_gpu_the_encoder_remembers_in_this_processs_memory():
    spared = VideoVAE(library_vae("wan2.1").cuda(), latents_per_call=1, low_memory=True)
    whole, session = VideoVAE(library_vae("wan2.1").cuda()), spared.encoder_session()
    clip = torch.rand(1, 13, 3, 16, 24, device="cuda") * 2 - 1
    torch.testing.assert_close(session.encode(clip), whole.encode(clip), rtol=0, atol=1e-3)
    assert all(kept.is_pinned() for kept in session._past if kept is not None)
