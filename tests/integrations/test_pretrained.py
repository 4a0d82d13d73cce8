"""Masked models of transformers: saving and loading, thresholds included."""

from __future__ import annotations

import pytest
import torch

import dst_kernels
from dst_kernels.nn.find import named_masked_weights

transformers = pytest.importorskip("transformers")
from dst_kernels.integrations.transformers import from_pretrained  # noqa: E402

pytestmark = pytest.mark.slow
SMALL = {
    "bert": transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        vocab_size=50, max_position_embeddings=16,
    ),
    "gpt2": transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=16),
}  # fmt: skip
CASES = {
    "bert": (transformers.BertModel, dst_kernels.SparsifyConfig(skip_last=True), None),
    "bert, some": (
        transformers.BertForSequenceClassification,
        dst_kernels.SparsifyConfig(granularity="layer", reset_ratio=None),
        lambda module, name: "layer.1" not in name,
    ),
    "gpt2, tied": (
        transformers.GPT2LMHeadModel,
        dst_kernels.SparsifyConfig(embeddings=True, granularity="element"),
        None,
    ),
}
IDS = torch.arange(12).view(2, 6)


def thresholds(model) -> dict[str, torch.Tensor]:
    return {name: part.threshold for name, part in named_masked_weights(model)}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS)[0]


def trained(case: str):
    cls, config, filter_fn = CASES[case]
    model = dst_kernels.sparsify_(cls(SMALL[case.split(",")[0]]), config, filter_fn)
    with torch.no_grad():
        for _, part in named_masked_weights(model):
            part.threshold.copy_(part.weight.abs().median())
    return model


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case, tmp_path):
    cls, config, _ = CASES[case]
    model = trained(case)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(cls, tmp_path)
    assert type(loaded) is type(model) and thresholds(loaded).keys() == thresholds(model).keys()
    for name, threshold in thresholds(model).items():
        assert torch.equal(thresholds(loaded)[name], threshold)
    assert torch.equal(logits(loaded), logits(model))
    assert {p.module.masking for _, p in named_masked_weights(loaded)} == {config.mask_options()}
    pairs = {(id(p.weight), id(p.threshold)) for _, p in named_masked_weights(loaded)}
    assert len(pairs) == len({weight for weight, _ in pairs})  # tied weights, tied thresholds
    loaded.save_pretrained(tmp_path / "again")
    auto = {"bert": "AutoModel", "bert, some": "AutoModelForSequenceClassification"}
    again = from_pretrained(
        getattr(transformers, auto.get(case, "AutoModelForCausalLM")), tmp_path / "again"
    )
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("case", CASES)
def test_fixed_masks_round_trip(case, tmp_path):
    model = dst_kernels.freeze_masks_(trained(case))
    with torch.no_grad():
        for _, part in named_masked_weights(model):
            part.threshold.zero_()  # it says nothing
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(CASES[case][0], tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    masks = {name: part.fixed_mask for name, part in named_masked_weights(loaded)}
    assert not any(mask.all() for mask in masks.values())
    for name, part in named_masked_weights(model):
        assert torch.equal(masks[name], part.fixed_mask)


def test_a_finalized_model_is_dense_again(tmp_path):
    model = trained("bert")
    want = logits(model)
    dst_kernels.finalize_(model).save_pretrained(tmp_path)
    assert torch.equal(logits(transformers.BertModel.from_pretrained(tmp_path)), want)
    with pytest.raises(ValueError, match="does not say how the model was masked"):
        from_pretrained(transformers.BertModel, tmp_path)


def test_dense_checkpoints_give_zero_thresholds(tmp_path):
    """Uninitialised memory is made visible as NaN."""
    transformers.BertModel(SMALL["bert"]).save_pretrained(tmp_path)

    class Masked(transformers.BertForSequenceClassification):
        def __init__(self, config):
            super().__init__(config)
            dst_kernels.sparsify_(self)

    empty = torch.empty_like

    def dirty(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    torch.empty_like = dirty
    try:
        models = [
            Masked.from_pretrained(tmp_path),
            from_pretrained(
                transformers.BertForSequenceClassification,
                tmp_path,
                sparsify=dst_kernels.SparsifyConfig(),
            ),
        ]
    finally:
        torch.empty_like = empty
    for model in models:
        assert len(thresholds(model)) == 14
        assert all(not t.any() for t in thresholds(model).values())
        assert logits(model).isfinite().all()


def test_thresholds_without_a_place_are_an_error(tmp_path):
    trained("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no place in this model"):
        from_pretrained(
            transformers.BertModel, tmp_path, sparsify=dst_kernels.SparsifyConfig(min_numel=300)
        )


def test_load_checkpoint_and_dispatch_of_a_dense_file(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    dense = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LSTM(8, 3))
    torch.save(dense.state_dict(), tmp_path / "model.bin")
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LSTM(8, 3))
        dst_kernels.sparsify_(model)
    model = accelerate.load_checkpoint_and_dispatch(
        model, str(tmp_path / "model.bin"), device_map={"": "cpu"}
    )
    for threshold in thresholds(model).values():
        assert threshold.requires_grad and not threshold.any()
    x = torch.randn(5, 2, 4)
    torch.testing.assert_close(model(x)[0], dense(x)[0])


def test_adapters_on_a_masked_base_train():
    peft = pytest.importorskip("peft")
    model = trained("bert, some")
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "value"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    adapters = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_B" in n}
    before = {name: t.detach().clone() for name, t in thresholds(model).items()}
    losses = []
    for _ in range(5):
        loss = model(IDS, labels=torch.tensor([0, 1]))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and len(adapters) > 0
    after = dict(model.named_parameters())
    assert all(not torch.equal(after[n], value) for n, value in adapters.items())
    assert all(torch.equal(thresholds(model)[n], value) for n, value in before.items())


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_an_adapter_is_not_merged_into_a_masked_weight(how):
    """Weight + adapter would be masked."""
    peft = pytest.importorskip("peft")

    def adapted(model):
        options = {"target_modules": ["query", "value"], "init_lora_weights": False}
        return peft.get_peft_model(model, peft.LoraConfig(**options)).eval()

    model = adapted(trained("bert, some").eval())
    expected = model(IDS)["logits"].detach()
    with pytest.raises(RuntimeError, match=r"cannot be merged .*finalize_\(model\) first"):
        getattr(model, how)()
    assert torch.equal(model(IDS)["logits"], expected)

    model = adapted(dst_kernels.finalize_(trained("bert, some").eval()))
    expected = model(IDS)["logits"].detach()
    merged = getattr(model, how)() or model
    torch.testing.assert_close(merged(IDS)["logits"], expected, rtol=1e-4, atol=1e-5)
