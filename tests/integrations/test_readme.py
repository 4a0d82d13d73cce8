"""The README's blocks on frameworks, run as they are written; what docs/frameworks.md says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import dst_kernels
from dst_kernels.optim import DSTSGD

README = Path(__file__).parents[2] / "README.md"
pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks


def block(framework: str) -> str:
    section = README.read_text().split("## Training with transformers")[1]
    found = [b for b in re.findall(r"```python\n(.*?)```", section, re.S) if framework in b]
    return found[0]


@pytest.mark.slow
def test_transformers(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        vocab_size=50,
    )  # fmt: skip
    ids = torch.arange(6)
    scope = {
        "dst_kernels": dst_kernels,
        "transformers": transformers,
        "model": transformers.BertForSequenceClassification(config),
        "training_args": transformers.TrainingArguments(
            "out", num_train_epochs=1, report_to=[], use_cpu=True, learning_rate=0.1
        ),
        "train_dataset": [{"input_ids": ids, "labels": i % 2} for i in range(16)],
    }
    exec(block("DSTTrainer"), scope)
    trained, loaded = scope["trainer"].model.state_dict(), scope["model"].state_dict()
    assert trained.keys() == loaded.keys()
    assert all(torch.equal(trained[name], loaded[name]) for name in trained)
    assert all(value.any() for name, value in loaded.items() if "threshold" in name)


@pytest.mark.slow
def test_lightning(tmp_path, monkeypatch):
    lightning = pytest.importorskip("lightning.pytorch")
    monkeypatch.chdir(tmp_path)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = dst_kernels.sparsify_(nn.Linear(4, 2))

        def training_step(self, batch, index):
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(dst_kernels.parameter_groups(self, lr=0.1))

    module = Module()
    scope = {"lightning": lightning, "lightning_module": module}
    scope["loader"] = torch.utils.data.DataLoader(torch.randn(9, 4), batch_size=3)
    exec(block("DSTCallback"), scope)
    assert module.layer.threshold.all()


@pytest.mark.slow
def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model = dst_kernels.sparsify_(nn.Linear(4, 2))
    scope = {
        "dst_kernels": dst_kernels, "model": model, "alpha": 1e-2,
        "loss_fn": nn.functional.mse_loss,
        "accelerator": accelerate.Accelerator(cpu=True), "optimizer": DSTSGD(model, lr=0.1),
        "loader": torch.utils.data.DataLoader([(torch.randn(4), torch.randn(2))] * 6, batch_size=2),
    }  # fmt: skip
    exec(block("install_clipping_"), scope)
    assert model.threshold.all()


def test_an_l1_term_as_the_documentation_gives_it():
    """Shrinking after the step is what torch.optim and the same lines do; a loss term is not."""
    text = (README.parent / "docs" / "frameworks.md").read_text()
    lines = re.search(r"  ```python\n(.*?)  ```", text, re.S)[1].replace("\n  ", "\n")[2:]
    x = torch.randn(5, 6)

    def train(own: bool, term: bool) -> torch.Tensor:
        torch.manual_seed(1)
        model = dst_kernels.sparsify_(nn.Linear(6, 4))
        with torch.no_grad():
            model.threshold.fill_(0.2)
        optimizer = DSTSGD(model, lr=0.1) if own else torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            (loss + 0.1 * model.weight.abs().sum() if term else loss).backward()
            scope = {"optimizer": optimizer, "torch": torch, "masked_weights": [model.weight]}
            exec("optimizer.step()" if term else lines, {**scope, "lr": 0.1, "l1": 0.1})
        return model.weight.detach().clone()

    torch.testing.assert_close(train(own=True, term=False), train(own=False, term=False))
    assert (train(own=True, term=True) - train(own=False, term=True)).abs().max() > 0.01


@pytest.mark.parametrize("granularity", ["row", "element"])
def test_what_timm_decays(granularity):
    timm_optim = pytest.importorskip("timm.optim")
    config = dst_kernels.SparsifyConfig(granularity=granularity)
    model = dst_kernels.sparsify_(nn.Sequential(nn.Linear(4, 3)), config)
    groups = dst_kernels.parameter_groups(model, weight_decay=0.05)
    for parameters, spared in (model, granularity == "row"), (groups, True):
        made = timm_optim.create_optimizer_v2(parameters, opt="adamw", lr=0.1, weight_decay=0.05)
        decayed = {id(p) for g in made.param_groups if g["weight_decay"] for p in g["params"]}
        assert (id(model[0].threshold) not in decayed) == spared
