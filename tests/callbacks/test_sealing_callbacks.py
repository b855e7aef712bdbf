"""Sealing as a framework saves, verifying as it loads: with the real Trainers, in `train` and in `resume`."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import ckptflip  # noqa: E402
from ckptflip.cli.main import run  # noqa: E402
from ckptflip.errors import DamagedCheckpointError, SealError  # noqa: E402
from ckptflip.protect.seals import verified  # noqa: E402
from ckptflip.training import harness  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def damaged(path: Path) -> None:
    ckptflip.inject(path, in_place=True, count=1, bits="30", seed=1)


class TestTraining:
    def test_train_seals_and_resume_verifies(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        harness.train("digits-mlp", 1, folder, seal=0.05)
        assert all(ckptflip.verify(folder / f"epoch_00{i}.h5").intact for i in (0, 1))
        start = folder / "epoch_001.h5"
        harness.resume("digits-mlp", start, 2, verify=True, save=tmp_path / "more", seal=0.0)
        assert ckptflip.verify(tmp_path / "more/epoch_002.h5").intact
        damaged(start)
        with pytest.raises(DamagedCheckpointError, match="bit 30 of element"):
            harness.resume("digits-mlp", start, 2, verify=True, overwrite=True)
        assert ckptflip.repair(start, in_place=True).whole
        harness.resume("digits-mlp", start, 2, verify=True, overwrite=True)

    def test_an_overwritten_run_takes_its_seals_with_it(self, tmp_path: Path) -> None:
        harness.train("digits-mlp", 1, tmp_path / "run", seal=0.0)
        harness.train("digits-mlp", 1, tmp_path / "run", overwrite=True)
        assert not list((tmp_path / "run").glob("*.seal"))

    def test_the_commands(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = str(tmp_path / "run")
        assert run(["train", "digits-mlp", "--epochs", "1", "--save", folder, "--seal"]) == 0
        assert run(["verify", folder, "--epoch", "1"]) == 0
        start = f"{folder}/epoch_001.h5"
        assert run(["resume", "digits-mlp", start, "--until", "2", "--verify"]) == 0
        damaged(Path(start))
        again = ["resume", "digits-mlp", start, "--until", "2", "--verify", "--overwrite"]
        assert run(again) == 3
        assert "ckptflip repair" in capsys.readouterr().err
        Path(f"{start}.seal").unlink()
        assert run(again) == 1


class TestLightning:
    @pytest.fixture
    def pl(self) -> Any:
        pytest.importorskip("lightning")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import lightning.pytorch as pl
        return pl

    def fitted(self, pl: Any, folder: Path, epochs: int, start: str | None = None) -> None:
        from torch_runs import X, Y, small_model

        from ckptflip.callbacks import LightningSealer

        class Module(pl.LightningModule):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.net = small_model(1)

            def training_step(self, batch: Any, index: int) -> Any:
                return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

            def configure_optimizers(self) -> Any:
                return torch.optim.Adam(self.parameters(), lr=0.01)

        saver = pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=1, monitor=None)
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, callbacks=[saver], enable_progress_bar=False,
            enable_model_summary=False, plugins=[LightningSealer(repair=0.1)],
        )  # fmt: skip
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=8)
        trainer.fit(Module(), data, ckpt_path=start)

    def test_seals_verifies_and_takes_seals_away(self, pl: Any, tmp_path: Path) -> None:
        self.fitted(pl, tmp_path, 2)
        (path,) = tmp_path.glob("*.ckpt")  # the first epoch's was removed, and its seal with it
        assert [p.name for p in tmp_path.glob("*.seal")] == [f"{path.name}.seal"]
        assert ckptflip.verify(path).intact
        damaged(path)
        with pytest.raises(DamagedCheckpointError):
            self.fitted(pl, tmp_path, 3, str(path))
        assert ckptflip.repair(path, in_place=True).whole
        self.fitted(pl, tmp_path, 3, str(path))
        Path(f"{path}.seal").unlink(missing_ok=True)
        if path.exists():
            with pytest.raises(SealError):
                self.fitted(pl, tmp_path, 4, str(path))


def test_the_trainer_of_hugging_face(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from torch_runs import X, Y, small_model
    from transformers import Trainer, TrainingArguments

    from ckptflip.callbacks import TrainerSealer

    class Module(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = small_model(1)

        def forward(self, x: Any, labels: Any) -> Any:
            outputs = self.net(x)
            return {"loss": torch.nn.functional.cross_entropy(outputs, labels), "logits": outputs}

    data = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]

    def trained(epochs: int, start: str | None = None) -> None:
        arguments = TrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=epochs, per_device_train_batch_size=8, report_to=[],
            disable_tqdm=True, use_cpu=True, save_strategy="epoch", save_total_limit=1, logging_strategy="no",
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(Module(), arguments, train_dataset=data, callbacks=[TrainerSealer()])
        trainer.train(resume_from_checkpoint=start)

    trained(2)
    (path,) = (p for p in tmp_path.iterdir() if p.is_dir())
    assert [p.name for p in tmp_path.glob("*.seal")] == [f"{path.name}.seal"]
    trained(3, str(verified(path)))
    (path,) = (p for p in tmp_path.iterdir() if p.is_dir())
    damaged(path / "model.safetensors")
    found = ckptflip.verify(path)
    # The folder is no checkpoint itself; the file in it names its tensors.
    assert [d.file for d in found.damage if d.what == "flip"] == ["model.safetensors"]
    assert found.damage[0].tensor.startswith("net.")
    with pytest.raises(DamagedCheckpointError):
        verified(path)
