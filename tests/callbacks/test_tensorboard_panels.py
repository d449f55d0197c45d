import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from rslightning.callbacks import (
    ActivationMomentMonitor,
    GradientNormMonitor,
    TensorBoardPanels,
    TokenThroughputMonitor,
)
from rslightning.rslora import AdapterSpec

MONITORS = (GradientNormMonitor, ActivationMomentMonitor, TokenThroughputMonitor)


@pytest.fixture
def events(make_trainer, make_module, make_data, tmp_path):
    """Return a function that fits and returns what TensorBoard reads."""

    def fit(*callbacks, **module_options):
        logger = TensorBoardLogger(tmp_path, name="run")
        callbacks = [*callbacks, TensorBoardPanels()]
        options = {"log_every_n_steps": 1, "val_check_interval": 1, "check_val_every_n_epoch": None}
        trainer = make_trainer(max_steps=2, logger=logger, callbacks=callbacks, **options)
        trainer.fit(make_module(**module_options), make_data())
        accumulator = EventAccumulator(logger.log_dir)
        accumulator.Reload()
        return accumulator

    return fit


def layout(events):
    (event,) = events.Tensors("custom_scalars__config__")
    found = Layout()
    found.ParseFromString(event.tensor_proto.string_val[0])
    return {
        category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart}
        for category in found.category
    }


def settings(events):
    data = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    found = HParamsPluginData.FromString(data).session_start_info.hparams
    return {name: value.string_value or value.number_value for name, value in found.items()}


def test_every_panel_has_curves(events):
    found = events(*(monitor(every_n_steps=1) for monitor in MONITORS))
    panels = layout(found)
    assert list(panels) == ["loss and perplexity", "gradient norms", "moments", "throughput"]
    patterns = [tag for charts in panels.values() for tags in charts.values() for tag in tags]
    assert len(patterns) == 3 + 4 + 6 + 4
    written = found.Tags()["scalars"]
    assert {pattern.strip("^$") for pattern in patterns} <= set(written)


def test_monitors_that_do_not_run_have_no_panels(events):
    assert list(layout(events())) == ["loss and perplexity"]


def test_runs_can_be_compared_by_their_settings(events, model_folder):
    spec = AdapterSpec(rank=4, alpha=6.0, scaling="lora", rank_pattern={"q_proj": 2})
    found = settings(events(adapter=spec))
    assert found.pop("model.trainable_parameters") > 1000
    assert found == {
        "model.base_model": str(model_folder),
        "adapter.rank": 4,
        "adapter.alpha": 6.0,
        "adapter.scaling": "lora",
        "adapter.gamma_r": pytest.approx(6.0 / 4),  # of the setting, whatever a pattern changes
        "optimizer": "AdamW",
        "learning_rate": pytest.approx(0.01),
    }


def test_what_is_shown_unasked_has_the_rank(events):
    assert sorted(settings(events()))[:5] == [
        "adapter.alpha", "adapter.gamma_r", "adapter.rank", "adapter.scaling", "learning_rate"
    ]  # fmt: skip


def test_full_fine_tuning_has_no_rank(events):
    assert set(settings(events(adapter=None))) == {
        "model.base_model", "optimizer", "learning_rate", "model.trainable_parameters"
    }  # fmt: skip


def test_other_loggers_are_left_alone(make_trainer, make_module, make_data, tmp_path):
    logger = CSVLogger(tmp_path, name="run")
    trainer = make_trainer(max_steps=1, logger=logger, callbacks=[TensorBoardPanels()])
    trainer.fit(make_module(), make_data())
    assert trainer.global_step == 1
