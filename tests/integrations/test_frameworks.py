"""Trainer, Lightning and accelerate against a plain loop with the regulariser in the loss."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

import dst_kernels
from dst_kernels.optim import DSTSGD, DSTAdamW

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of the frameworks, about workers and loggers
]
ALPHA, CLIP, STEPS, ACCUMULATE, LR = 0.02, 0.05, 20, 4, 0.05


class Net(nn.Module):
    """Takes and returns what transformers' Trainer does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x, labels=None):
        logits = self.b(self.a(x).relu())
        return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}


def batches(number: int = STEPS * ACCUMULATE) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(number, 4, 8, generator=generator)
    return [{"x": each, "labels": each[:, :3].argmax(1)} for each in x]


def masked() -> Net:
    torch.manual_seed(0)
    return dst_kernels.sparsify_(Net())


def optimizer_of(kind: str, model: nn.Module):
    """Return an optimizer, and what alpha is left to its framework."""
    groups = functools.partial(dst_kernels.parameter_groups, model, weight_decay=0.1)
    return {
        "SGD": lambda: (torch.optim.SGD(groups(), lr=LR, momentum=0.9), ALPHA),
        "AdamW": lambda: (torch.optim.AdamW(groups(), lr=LR), ALPHA),
        "DSTSGD": lambda: (DSTSGD(model, groups(), lr=LR, momentum=0.9, alpha=ALPHA), None),
        "DSTAdamW": lambda: (DSTAdamW(model, groups(), lr=LR, alpha=ALPHA), None),
        "DSTAdamW, alpha outside": lambda: (DSTAdamW(model, groups(), lr=LR), ALPHA),
    }[kind]()


@functools.cache
def _expected(kind: str, dtype: torch.dtype | None, double: bool) -> dict[str, torch.Tensor]:
    model = masked().double() if double else masked()
    optimizer, _ = optimizer_of(kind, model)
    data = batches()
    for step in range(STEPS):
        optimizer.zero_grad()
        for batch in data[step * ACCUMULATE : (step + 1) * ACCUMULATE]:
            batch = {**batch, "x": batch["x"].double()} if double else batch
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                loss = model(**batch)["loss"]
            loss = loss + ALPHA * dst_kernels.sparse_regularization(model)
            (loss / ACCUMULATE).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return copy.deepcopy(model.state_dict())


def compare(model: nn.Module, kind: str, bf16: bool = False) -> None:
    plain = kind.split(",")[0].removeprefix("DST")
    want = _expected(plain, torch.bfloat16 if bf16 else None, False)
    assert max(want[n].abs().max() for n in want if "threshold" in n) > 0.01
    exact = _expected(plain, None, True) if bf16 else want
    state = {n.removeprefix("net."): p for n, p in model.state_dict().items()}
    if not bf16:
        for name, value in want.items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-5)
        return
    error = {
        which: max((values[n].double() - exact[n]).abs().max().item() for n in exact)
        for which, values in (("own", state), ("torch", want))
    }
    assert error["own"] <= 2 * error["torch"]


KINDS = ["SGD", "AdamW", "DSTSGD", "DSTAdamW", "DSTAdamW, alpha outside"]


def dst_trainer(model, tmp_path, kind, bf16=False, **changes):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from dst_kernels.integrations.transformers import DSTTrainer

    class InOrder(DSTTrainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    options = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 1, "max_steps": STEPS,
        "gradient_accumulation_steps": ACCUMULATE, "max_grad_norm": CLIP, "learning_rate": LR,
        "lr_scheduler_type": "constant", "save_steps": 7, "logging_steps": 5, "report_to": [],
        "use_cpu": True, "bf16": bf16, "disable_tqdm": True, "adam_beta2": 0.999,
    }  # fmt: skip
    optimizer, alpha = (None, ALPHA) if kind is None else optimizer_of(kind, model)
    return InOrder(
        model=model,
        args=transformers.TrainingArguments(**{**options, **changes}),
        train_dataset=batches(),
        data_collator=lambda rows: rows[0],
        optimizers=(optimizer, None),
        alpha=alpha,
    )


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_trainer(tmp_path, kind, bf16):
    model = masked()
    trainer = dst_trainer(model, tmp_path, kind, bf16)
    trainer.train()
    compare(model, kind, bf16)
    logged = [entry for entry in trainer.state.log_history if "remaining_ratio" in entry]
    assert len(logged) == STEPS // 5
    assert logged[-1]["remaining_ratio"] == pytest.approx(dst_kernels.remaining_ratio(model).item())


@pytest.mark.parametrize("kind", ["AdamW", "DSTAdamW"])
def test_trainer_resumes(tmp_path, kind):
    dst_trainer(masked(), tmp_path, kind).train()
    resumed = masked()
    dst_trainer(resumed, tmp_path, kind).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-7")
    )
    compare(resumed, kind)


def test_trainers_own_optimizer_spares_thresholds(tmp_path):
    model = masked()
    trainer = dst_trainer(model, tmp_path, None, weight_decay=0.1, adam_epsilon=1e-8)
    trainer.train()
    decayed = {
        id(p) for g in trainer.optimizer.param_groups if g["weight_decay"] for p in g["params"]
    }
    assert decayed == {id(model.a.weight), id(model.b.weight)}


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate(tmp_path, kind):
    accelerate = pytest.importorskip("accelerate")
    from dst_kernels.integrations.accelerate import install_clipping_

    def run(model, first, last, resume=None):
        accelerator = accelerate.Accelerator(gradient_accumulation_steps=ACCUMULATE, cpu=True)
        optimizer, alpha = optimizer_of(kind, model)
        model, optimizer = accelerator.prepare(model, optimizer)
        install_clipping_(accelerator, optimizer)
        if resume:
            accelerator.load_state(resume)
        for batch in batches()[first * ACCUMULATE : last * ACCUMULATE]:
            with accelerator.accumulate(model):
                loss = model(**batch)["loss"]
                if alpha is not None:
                    loss = loss + alpha * dst_kernels.sparse_regularization(model)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
        return accelerator

    run(masked(), 0, 7).save_state(str(tmp_path / "state"))
    resumed = masked()
    accelerator = run(resumed, 7, STEPS, resume=str(tmp_path / "state"))
    compare(resumed, kind)
    if kind == "DSTSGD":
        with pytest.raises(ValueError, match="clips all its parameters at once"):
            accelerator.clip_grad_norm_(resumed.a.parameters(), CLIP)
        with pytest.raises(ValueError, match="cannot be clipped by value"):
            accelerator.clip_grad_value_(resumed.parameters(), CLIP)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_lightning(tmp_path, kind, bf16):
    lightning = pytest.importorskip("lightning.pytorch")
    from dst_kernels.integrations.lightning import DSTCallback

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = masked()

        def training_step(self, batch, index):
            return self.net(**batch)["loss"]

        def configure_optimizers(self):
            return optimizer_of(kind, self.net)[0]

    def fit(steps, data, **kwargs):
        task, alpha = Task(), None if kind in ("DSTSGD", "DSTAdamW") else ALPHA
        trainer = lightning.Trainer(
            max_steps=steps, accumulate_grad_batches=ACCUMULATE, gradient_clip_val=CLIP,
            accelerator="cpu", precision="bf16-mixed" if bf16 else "32-true", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[DSTCallback(alpha)], log_every_n_steps=5, barebones=False,
            default_root_dir=tmp_path,
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(data, batch_size=None, shuffle=False)
        trainer.fit(task, loader, **kwargs)
        assert "clip_gradients" not in vars(trainer.precision_plugin)
        assert "remaining_ratio" in trainer.logged_metrics or steps < 10
        return trainer, task

    data, file = batches(), tmp_path / "at7.ckpt"
    compare(fit(STEPS, data)[1], kind, bf16)
    fit(7, data)[0].save_checkpoint(file)
    # Lightning goes on in the middle of an epoch, but asks the loader for its first batch.
    rest = data[7 * ACCUMULATE :] + data[: 7 * ACCUMULATE]
    compare(fit(STEPS, rest, ckpt_path=file)[1], kind, bf16)


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("framework", ["trainer", "lightning"])
def test_a_target_in_place_of_alpha(tmp_path, framework, deferred):
    model = masked()
    controller = dst_kernels.TargetRatio(model, 0.5, STEPS)
    groups = dst_kernels.parameter_groups(model)
    if deferred:
        optimizer, alpha = DSTSGD(model, groups, lr=LR, alpha=controller), None
    else:
        optimizer, alpha = torch.optim.SGD(groups, lr=LR), controller
    if framework == "trainer":
        trainer = dst_trainer(model, tmp_path, "SGD")
        trainer.optimizer, trainer.alpha = optimizer, alpha
        trainer.create_optimizer()
        trainer.train()
    else:
        lightning = pytest.importorskip("lightning.pytorch")
        from dst_kernels.integrations.lightning import DSTCallback

        class Task(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.net = model

            def training_step(self, batch, index):
                return self.net(**batch)["loss"]

            def configure_optimizers(self):
                return optimizer

        lightning.Trainer(
            max_steps=STEPS, accelerator="cpu", logger=False, callbacks=[DSTCallback(alpha)],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path,
        ).fit(Task(), torch.utils.data.DataLoader(batches(), batch_size=None))  # fmt: skip
    assert controller.steps_done == STEPS
    report = dst_kernels.sparsity_report(model)
    assert report.kept == report.total // 2


def test_what_a_training_would_do_wrong(tmp_path):
    dense = Net()
    early = torch.optim.SGD(dense.parameters(), lr=LR)
    model = dst_kernels.sparsify_(dense)
    decaying = torch.optim.AdamW(model.parameters())
    from dst_kernels.integrations.common import check_alpha, check_training

    for optimizer, alpha, error in [
        (early, ALPHA, r"does not train the threshold of a \(2 such\): build it after sparsify_"),
        (decaying, ALPHA, r"weight_decay 0.01 reaches 2 thresholds"),
        (optimizer_of("AdamW", model)[0], None, "nothing adds the regulariser"),
        (DSTSGD(model, alpha=ALPHA), ALPHA, "the optimizer has one already"),
    ]:
        with pytest.raises(ValueError, match=error):
            check_training(model, [optimizer], alpha, "trainer")
    with pytest.raises(ValueError, match="alpha must be at least 0 and finite"):
        check_alpha(-1.0)
    batch = batches()[0]
    assert (
        "no given optimizer trains"
        in dst_kernels.check_masks(model, **batch, optimizers=[early])["a"]
    )
