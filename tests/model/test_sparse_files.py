"""save_sparse and load_sparse: every bit comes back, and no file does harm."""

from __future__ import annotations

import copy
import json
import random
import struct

import pytest
import torch
from torch import nn

import dst_kernels
from dst_kernels.model import encoding
from dst_kernels.model.rebuild import mark_shrunk_
from dst_kernels.model.sparse_file import _digest
from dst_kernels.nn.find import named_masked_weights

safetensors = pytest.importorskip("safetensors.torch")


class Tied(nn.Module):
    """An embedding and a masked layer that share their weight, a convolution, an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm1d(8)
        self.lstm = nn.LSTM(8, 8)
        self.head = nn.Linear(8, 12)
        self.head.weight = self.embedding.weight


def linears() -> nn.Module:
    return nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 16), nn.Linear(16, 4))


def masked(build=linears, dtype=torch.float32, kind="row", seed=0) -> nn.Module:
    """Return a model with masks of its own, with special values in its weights."""
    torch.manual_seed(seed)
    granularity = "row" if kind == "fixed" else kind
    model = dst_kernels.sparsify_(
        build().to(dtype), dst_kernels.SparsifyConfig(granularity=granularity)
    )
    special = torch.tensor([-0.0, 0.0, float("nan"), float("inf"), -float("inf")], dtype=dtype)
    least = torch.finfo(dtype).smallest_normal / 4  # subnormal
    with torch.no_grad():
        for _, part in named_masked_weights(model):
            part.weight.view(-1)[:5] = special
            part.weight.view(-1)[5] = -least
            part.threshold.copy_(part.weight.nan_to_num(0, 0, 0).abs().float().quantile(0.9))
            part.threshold.view(-1)[-1] = -1e-3  # keeps even zeros
    if kind == "fixed":
        for _, part in named_masked_weights(model):
            part.set_fixed_mask(torch.rand(part.weight.shape) < 0.3)
            part.module._buffers[part.fixed_mask_name].view(-1)[:6] = True
    return model


def bits(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and state[name].shape == tensor.shape, name
        assert torch.equal(bits(state[name]), bits(tensor)), name


@pytest.mark.parametrize("kind", ["row", "layer", "element", "fixed"])
@pytest.mark.parametrize("build", [linears, Tied])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_every_bit_comes_back(build, dtype, kind, tmp_path):
    model, file = masked(build, dtype, kind), tmp_path / "model.safetensors"
    before = copy.deepcopy(model.state_dict())
    dst_kernels.save_sparse(model, file, {"by": "a test"})
    assert_same(model.state_dict(), before)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    expected = dst_kernels.finalize_(copy.deepcopy(model)).state_dict()
    assert_same(dst_kernels.load_sparse(file), expected)

    dense = build().to(dtype)
    assert dst_kernels.load_sparse(file, dense) is dense
    assert_same(dense.state_dict(), expected)

    other = masked(build, dtype, "fixed" if kind == "row" else kind, seed=1)
    if kind == "fixed":
        dst_kernels.unfreeze_masks_(other)
    dst_kernels.load_sparse(file, other)
    pairs = zip(named_masked_weights(model), named_masked_weights(other), strict=True)
    for (name, part), (_, loaded) in pairs:
        assert torch.equal(part.mask(), loaded.mask()), name
        assert torch.equal(bits(part.threshold), bits(loaded.threshold)), name
        assert (part.fixed_mask is None) == (loaded.fixed_mask is None), name
    assert_same(dst_kernels.finalize_(other).state_dict(), expected)

    dst_kernels.save_sparse(dense, file)  # as finalize_ makes it: without thresholds
    other = masked(build, dtype, kind, seed=2)
    dst_kernels.load_sparse(file, other)
    assert all(not part.threshold.any() for _, part in named_masked_weights(other))
    state = dst_kernels.finalize_(other).state_dict()
    for name, tensor in expected.items():  # but -0.0, which |W| > 0 prunes
        assert torch.equal(bits(state[name] + 0), bits(tensor + 0)), name


@pytest.mark.parametrize(
    ("dtype", "kept", "most"),
    [(torch.float32, 0.05, 0.085), (torch.bfloat16, 0.05, 0.115), (torch.float32, 0.02, 0.03)],
    ids=str,
)
def test_sizes(dtype, kept, most, tmp_path):
    layer = nn.Linear(512, 512, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight[torch.rand(512, 512) >= kept] = 0
    file = tmp_path / "model.safetensors"
    dst_kernels.save_sparse(layer, file)
    assert file.stat().st_size <= most * len(safetensors.save(layer.state_dict()))


@pytest.mark.parametrize("shape", [(7,), (1, 1), (3, 5), (64, 3, 3, 3), (40, 700), (0, 4), (4, 0)])
@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 1])
def test_encodings(shape, share):
    torch.manual_seed(0)
    tensor = torch.randn(shape)
    kept = torch.rand(shape) < share
    kept[:1] = False
    sparse = torch.where(kept, tensor, 0)
    for tensor_kept in (kept, None):
        made = encoding.encode(sparse if tensor_kept is None else tensor, tensor_kept)
        if made.encoding == encoding.PLAIN:
            assert tensor_kept is None and torch.equal(made.values, sparse)
            continue
        decoded, positions = encoding.decode(*made, shape)
        assert torch.equal(positions, kept) and torch.equal(decoded, sparse)


class Shrinkable(nn.Module):
    """Layers of each kind, in a number of channels."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.depthwise = nn.Conv2d(width, width, 3, groups=width, padding_mode="reflect", padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(16 * width, 10)

    def forward(self, images):
        return self.fc(self.norm(self.depthwise(self.conv(images))).flatten(1))


def sparse_or_shrunk(width: int) -> nn.Module:
    """Return a model as `finalize_` makes it: layers that are smaller, some of them sparse."""
    model = Shrinkable(width).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[torch.rand_like(parameter) < 0.7] = 0
    for layer in (model.conv, model.depthwise, model.norm, model.fc):
        mark_shrunk_(layer)
    model.fc = dst_kernels.nn.SparseLinear.from_dense(model.fc)
    model.conv = dst_kernels.nn.SparseConv2d.from_dense(model.conv)
    return model


@pytest.mark.parametrize("width", [8, 3])
def test_sparse_and_shrunk_layers_come_back(width, tmp_path):
    model, file = sparse_or_shrunk(width), tmp_path / "model.safetensors"
    images = torch.randn(2, 3, 4, 4)
    expected = model(images)
    dst_kernels.save_sparse(model, file)
    whole = Shrinkable().eval()
    fc, seen = whole.fc, []
    fc.register_forward_hook(lambda *args: seen.append(args))
    dst_kernels.load_sparse(file, whole)
    assert whole.fc is fc and isinstance(fc, dst_kernels.nn.SparseLinear)
    assert repr(whole) == repr(model) and not whole.training
    assert torch.equal(whole(images), expected) and seen
    dst_kernels.save_sparse(whole, file)  # what was loaded can be saved
    again = sparse_or_shrunk(width)
    dst_kernels.load_sparse(file, again)
    assert torch.equal(again(images), expected)
    state = dst_kernels.load_sparse(file)
    assert state["fc.weight"].shape == (10, 16 * width)
    masked = dst_kernels.sparsify_(Shrinkable().eval())
    if width == 8:
        dst_kernels.load_sparse(file, masked)
        torch.testing.assert_close(masked(images), expected)
    else:
        with pytest.raises(ValueError, match=r"conv: it was made smaller, but .* is masked"):
            dst_kernels.load_sparse(file, masked)
    dst_kernels.save_sparse(Shrinkable(width), file)  # not from finalize_: nothing may shrink
    if width != 8:
        with pytest.raises(ValueError, match=r"conv\.weight: it is torch\.float32 \[3, 3"):
            dst_kernels.load_sparse(file, Shrinkable().eval())


def _described(name, **arguments):
    def change(header, tensors):
        header["layers"][name]["arguments"].update(arguments)

    return change


LAYERS = {
    "a class of its own": (
        lambda header, tensors: header["layers"]["fc"].update({"class": "Bilinear"}),
        "fc: its class is 'Bilinear'. Accepted: Linear,",
    ),
    "another kind": (
        lambda header, tensors: header["layers"]["fc"].update({"class": "Conv1d"}),
        "fc: it is a Conv1d in the file and a Linear in the model",
    ),
    "a huge layer": (_described("fc", in_features=2**40), "fc: in_features is 1099511627776. Acc"),
    "less than none": (_described("fc", in_features=-1), "fc: in_features is -1."),
    "another size": (_described("fc", in_features=47), "fc: its tensors are {"),
    "true": (_described("fc", out_features=True), "fc: out_features is True."),
    "other groups": (_described("depthwise", groups=2), "depthwise: "),
    "another stride": (_described("conv", stride=[2, 2]), "conv: stride is [2, 2] in the file"),
    "an argument": (_described("conv", device="cuda"), "conv: its arguments are"),
    "no arguments": (
        lambda header, tensors: header["layers"].update(fc=[]), "fc: its description is []",
    ),
    "a bias of no layer": (_described("conv", bias=True), "conv: its tensors are"),
    "a tensor more": (
        lambda header, tensors: tensors.update({"fc.x": torch.ones(2)}), "fc: its tensors are",
    ),
    "a tensor less": (lambda header, tensors: tensors.pop("norm.weight"), "norm: its tensors are"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_a_forged_layer_is_refused(name, tmp_path):
    change, words = LAYERS[name]
    file, model = tmp_path / "model.safetensors", Shrinkable()
    dst_kernels.save_sparse(sparse_or_shrunk(3), file)
    file.write_bytes(forged(file.read_bytes(), change))
    before, described = copy.deepcopy(model.state_dict()), repr(model)
    with pytest.raises(dst_kernels.SparseFileError) as caught:
        dst_kernels.load_sparse(file, model)
    assert str(caught.value).startswith(f"{file}: {words}")
    assert_same(model.state_dict(), before)
    assert repr(model) == described


# -- files that are not what they seem ---------------------------------------------------------


def forged(data: bytes, change) -> bytes:
    """Return the file after `change(header, tensors)`, with a checksum that is right."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["dst_kernels"])
    tensors = safetensors.load(data)
    change(header, tensors)
    if isinstance(header.get("sha256"), str):
        header["sha256"] = _digest(header, tensors)
    return safetensors.save(tensors, {"dst_kernels": json.dumps(header)})


def _weight(**entry):
    return lambda header, tensors: header["weights"]["0.weight"].update(entry)


def _tensor(name, value):
    return lambda header, tensors: tensors.update({name: value(tensors[name])})


def _ones(header, tensors):
    tensors["0.weight:rows"][-1] = 255


FORGERIES = {
    "a huge shape": (_weight(shape=[2**40, 2**20]), "0.weight: its rows have 7 bytes"),
    "a wide shape": (_weight(shape=[50, 2**40]), "0.weight: its bitmap have"),
    "an overflow": (_weight(shape=[2**62] * 60), "0.weight: its rows have 7 bytes"),
    "no shape": (_weight(shape=None), "0.weight: its shape None"),
    "a negative size": (_weight(shape=[50, -1]), "0.weight: its shape"),
    "another encoding": (_weight(encoding="deltas"), "0.weight: the file has no tensor"),
    "an unknown encoding": (_weight(encoding=["bitmap"]), "0.weight: its entry"),
    "an unknown key": (_weight(offset=3), "0.weight: its entry"),
    "a lost threshold": (_weight(threshold="1.threshold"), "0.weight: the file has no threshold"),
    "a threshold of no name": (_weight(threshold=3), "0.weight: its threshold is 3"),
    "fixed by a word": (_weight(fixed="yes"), "0.weight: its threshold"),
    "too few values": (_tensor("0.weight", lambda t: t[1:]), "0.weight: it has"),
    "integers": (_tensor("0.weight", lambda t: t.long()), "0.weight: its values are torch.int64"),
    "a square": (_tensor("0.weight", lambda t: t[:4].view(2, 2)), "0.weight: its values are"),
    "signed rows": (_tensor("0.weight:rows", lambda t: t.char()), "0.weight: its rows are"),
    "bits at the end": (_ones, "0.weight: its rows have bits set behind the last"),
    "dead rows": (_tensor("0.weight:rows", lambda t: t * 0), "0.weight: its bitmap has 0 live"),
    "other deltas": (
        _tensor("2.weight:deltas", lambda t: t * 0 + 254), "2.weight: its deltas end at",
    ),
    "no deltas": (_tensor("2.weight:deltas", lambda t: t[:0]), "2.weight: its deltas end at 0 of"),
    "skips only": (_tensor("2.weight:deltas", lambda t: t | 255), "2.weight: its deltas end at"),
    "a weight of nothing": (
        lambda header, tensors: header["weights"].update(x={"encoding": "plain"}), "x: the file",
    ),
    "a loop of names": (
        lambda header, tensors: header["same"].update(x="x"), "x: it is said to be the tensor 'x'",
    ),
    "a newer version": (lambda header, tensors: header.update(version=2), "version: it is 2"),
    "no checksum": (lambda header, tensors: header.pop("sha256"), "its header has"),
    "a list": (lambda header, tensors: header.update(weights=[]), "weights: it is []"),
    "another dtype": (_tensor("0.bias", lambda t: t.double()), "0.bias: it is torch.float64"),
    "another size": (_tensor("0.bias", lambda t: t[1:]), "0.bias: it is torch.float32 [49]"),
    "one tensor less": (lambda header, tensors: tensors.pop("0.bias"), "0.bias: the model has it"),
    "one tensor more": (
        lambda header, tensors: tensors.update(x=torch.ones(1)), "x: the file has it",
    ),
    "other thresholds": (_tensor("0.threshold", lambda t: t[1:]), "0.threshold: it is"),
    "a layer of nowhere": (
        lambda header, tensors: header["layers"].update(x={}), "x: the model has no such layer",
    ),
}  # fmt: skip


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(30, 50), nn.ReLU(), nn.Linear(50, 40))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return (file, bytes, model): a bitmap and deltas."""
    model = dst_kernels.sparsify_(small())
    dst_kernels.prune_(model, 0.5, scope="layer")
    part = named_masked_weights(model)[1][1]
    part.set_fixed_mask(torch.rand(part.weight.shape) < 0.03)
    file = tmp_path_factory.mktemp("files") / "model.safetensors"
    dst_kernels.save_sparse(model, file)
    header = json.loads(safetensors.load(file.read_bytes()) and _metadata(file.read_bytes()))
    assert [entry["encoding"] for entry in header["weights"].values()] == ["bitmap", "deltas"]
    return file, file.read_bytes(), model


def _metadata(data):
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"][
        "dst_kernels"
    ]


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_file_is_refused(name, saved):
    file, data, _ = saved
    change, words = FORGERIES[name]
    file.write_bytes(forged(data, change))
    model = dst_kernels.sparsify_(small())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(dst_kernels.SparseFileError) as caught:
        dst_kernels.load_sparse(file, model)
    assert str(caught.value).startswith(f"{file}: {words}")
    assert_same(model.state_dict(), before)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return a file that somebody has damaged, or forged with a checksum that is right."""
    size = 8 + int.from_bytes(data[:8], "little")
    kind = rng.randrange(8)
    if kind < 3:  # bits: of the header, of the data, of all
        start, end = ((0, size), (size, len(data)), (0, len(data)))[kind]
        flipped = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 20))):
            flipped[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == 3:
        cut = rng.randrange(len(data))
        return data[:cut] if rng.random() < 0.7 else data[:cut] + data[cut + rng.randrange(99) :]
    if kind == 4:  # the header's text: a number, a name or a piece of it for another
        text = data[8:size].decode()
        words = [
            '"F32"',
            '"U8"',
            "[",
            "]",
            "0",
            "1",
            "65535",
            "-1",
            "1e9",
            '"0.weight"',
            "{",
            "null",
        ]
        old = rng.choice(
            [w for w in (*words, "bitmap", "deltas", "shape", "50", "40") if w in text]
        )
        text = text.replace(old, rng.choice(words), rng.choice((1, -1)))
        return struct.pack("<Q", len(text.encode())) + text.encode() + data[size:]

    def change(header, tensors):
        for _ in range(rng.choice((1, 1, 3))):
            if kind == 5:  # the JSON of ours
                place = rng.choice([header, header["weights"], *header["weights"].values()])
                place = place if isinstance(place, dict) and place else header
                values = [0, -1, 2**31, 2**70, 1.5, True, None, "0.weight", [], {}, [50, 30],
                          [2**31, 2**31], [50, 2**50], "plain", "bitmap", "deltas"]  # fmt: skip
                name = rng.choice([*place, "shape", "x"])
                if name in ("weights", "sha256") or rng.random() < 0.2:
                    place.pop(name, None)
                    header.setdefault("weights", {})
                else:
                    place[name] = rng.choice(values)
            else:
                name = rng.choice([*tensors])
                tensor = tensors[name]
                change = rng.randrange(5)
                if change == 0 and tensor.numel():  # other positions, other values
                    at = rng.randrange(tensor.numel())
                    tensor.view(-1).view(torch.uint8)[at] = rng.randrange(256)
                elif change == 1:
                    tensors[name] = tensor.view(-1)[: rng.randrange(tensor.numel() + 1)].clone()
                elif change == 2:
                    tensors[name] = tensor.to(rng.choice((torch.uint8, torch.half, torch.int64)))
                elif change == 3:
                    tensors[rng.choice([*tensors])] = tensor.flip(0)
                elif len(tensors) > 1:
                    del tensors[name]

    return forged(data, change)


def fuzz(saved, count: int, seed: int, monkeypatch) -> dict[str, int]:
    """Load mutated files; return how many were refused, and how many loaded."""
    file, data, original = saved
    file.write_bytes(data)
    states = {True: dst_kernels.load_sparse(file), False: copy.deepcopy(original.state_dict())}
    zeros, rng = torch.zeros, random.Random(seed)

    def limited(*shape, **options):
        made = zeros(*shape, **{**options, "device": "meta"})
        assert made.numel() <= 256 * len(data), "a forged shape was allocated"
        return zeros(*shape, **options)

    monkeypatch.setattr(torch, "zeros", limited)
    outcomes = {"refused": 0, "loaded": 0, "as it was": 0}
    dense, sparse = small(), dst_kernels.sparsify_(small())
    for _ in range(count):
        broken = mutated(data, rng)
        file.write_bytes(broken)
        is_dense = rng.random() < 0.5
        model = dense if is_dense else sparse
        before = {name: value.clone() for name, value in model.state_dict().items()}
        try:
            dst_kernels.load_sparse(file, model)
            found = dst_kernels.load_sparse(file)
        except dst_kernels.SparseFileError as error:
            assert str(error).startswith(f"{file}: ")
            assert_same(model.state_dict(), before)
            outcomes["refused"] += 1
            continue
        forms = {name: value.shape for name, value in dense.state_dict().items()}
        assert {name: value.shape for name, value in found.items()} == forms
        if is_dense:
            assert_same(model.state_dict(), found)
        try:
            assert_same(found, states[True])
            outcomes["as it was"] += 1
        except AssertionError:
            outcomes["loaded"] += 1
            # Only a right checksum lets other values pass.
            assert json.loads(_metadata(broken))["sha256"] != json.loads(_metadata(data))["sha256"]
    return outcomes


def test_no_mutated_file_does_harm(saved, monkeypatch):
    outcomes = fuzz(saved, 200, seed=0, monkeypatch=monkeypatch)
    assert outcomes["refused"] > 120 and outcomes["loaded"] > 0, outcomes


def test_what_a_file_cannot_have_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"before")
    layer = dst_kernels.sparsify_(small())
    nn.utils.parametrizations.weight_norm(layer[0])
    with pytest.raises(ValueError, match=r"0\.weight cannot be saved: it is computed at each use"):
        dst_kernels.save_sparse(layer, file)
    for tensor, words in (
        (torch.ones(2, device="meta"), "it has no values"),
        (torch.eye(2).to_sparse(), "it is no plain dense tensor"),
        (torch.ones(2, dtype=torch.complex64), "a file has no torch.complex64"),
    ):
        model = small()
        model.register_buffer("odd", tensor)
        with pytest.raises(ValueError, match=f"^odd cannot be saved: {words}"):
            dst_kernels.save_sparse(model, file)
    with pytest.raises(TypeError, match="not JSON serializable"):
        dst_kernels.save_sparse(small(), file, {"notes": object()})
    assert file.read_bytes() == b"before"
    for written in (b"", b"before", safetensors.save({"x": torch.ones(2)})):
        file.write_bytes(written)
        with pytest.raises(ValueError, match=r"no whole safetensors file|a file that dst_kernels"):
            dst_kernels.load_sparse(file)
    with pytest.raises(FileNotFoundError):
        dst_kernels.load_sparse(tmp_path / "none")
