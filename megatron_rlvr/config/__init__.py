"""The settings of a run, by section, validated where they are defined. Imports no torch.

    run, log                                       config/run.py
    model, parallel                                config/model.py
    data, evaluate                                 config/data.py
    rollout, sync, reward                          config/rollout.py
    advantage, selection, loss, batch, optimizer   config/training.py

Sections are frozen and passed on whole. An unknown key is refused with the nearest known one, a renamed key with its
new name (`loading.py`), a setting without effect with the setting that disables it (`no_effect.py`); a file may extend
another (`layers.py`). Defaults follow the paper (arXiv 2506.01939).
"""

from pydantic import Field, PrivateAttr, model_validator

from megatron_rlvr.config.data import DataSettings as DataSettings
from megatron_rlvr.config.data import DifficultySettings as DifficultySettings
from megatron_rlvr.config.data import EvaluateSettings as EvaluateSettings
from megatron_rlvr.config.data import EvaluationFileSettings as EvaluationFileSettings
from megatron_rlvr.config.data import FileSettings as FileSettings
from megatron_rlvr.config.data import PromptFileSettings as PromptFileSettings
from megatron_rlvr.config.data import names_of as names_of
from megatron_rlvr.config.model import ModelSettings as ModelSettings
from megatron_rlvr.config.model import ParallelSettings as ParallelSettings
from megatron_rlvr.config.no_effect import check_no_effect
from megatron_rlvr.config.rollout import RewardSettings as RewardSettings
from megatron_rlvr.config.rollout import RolloutSettings as RolloutSettings
from megatron_rlvr.config.rollout import SyncSettings as SyncSettings
from megatron_rlvr.config.run import LogSettings as LogSettings
from megatron_rlvr.config.run import RunSettings as RunSettings
from megatron_rlvr.config.section import FreeForm, Section
from megatron_rlvr.config.section import SettingsError as SettingsError
from megatron_rlvr.config.section import Unused as Unused
from megatron_rlvr.config.training import AdvantageSettings as AdvantageSettings
from megatron_rlvr.config.training import BatchSettings as BatchSettings
from megatron_rlvr.config.training import LossSettings as LossSettings
from megatron_rlvr.config.training import OptimizerSettings as OptimizerSettings
from megatron_rlvr.config.training import SelectionSettings as SelectionSettings


class Settings(Section):
    """All settings of a run."""

    run: RunSettings
    model: ModelSettings
    parallel: ParallelSettings = ParallelSettings()
    data: DataSettings
    rollout: RolloutSettings = RolloutSettings()
    sync: SyncSettings = SyncSettings()
    reward: RewardSettings = RewardSettings()
    advantage: AdvantageSettings = AdvantageSettings()
    selection: SelectionSettings = SelectionSettings()
    loss: LossSettings = LossSettings()
    batch: BatchSettings = BatchSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    log: LogSettings = LogSettings()
    megatron: FreeForm = Field(default_factory=dict)
    """Any field of Megatron's TransformerConfig, DistributedDataParallelConfig or OptimizerConfig."""

    _unused: tuple[Unused, ...] = PrivateAttr(default=())

    @property
    def unused(self) -> tuple[Unused, ...]:
        """Settings of a file that a later file or flag made ineffective; see `layers.py`."""
        return self._unused

    @property
    def max_sequence_tokens(self) -> int:
        """Longest sequence of the run in tokens: the longest prompt and the longest response."""
        return self.data.max_prompt_tokens + self.rollout.max_response_tokens

    @model_validator(mode="after")
    def _across_sections(self) -> "Settings":
        check_no_effect(self)
        reward, rollout = self.reward, self.rollout
        if reward.overlong_buffer >= rollout.max_response_tokens:
            raise ValueError(
                f"reward.overlong_buffer={reward.overlong_buffer}: must be below "
                f"rollout.max_response_tokens={rollout.max_response_tokens}; lower it, or set it to 0 for no penalty"
            )
        for url in self.evaluate.servers:
            if url in rollout.servers:
                raise ValueError(
                    f"evaluate.servers={url}: also in rollout.servers, whose weights change while it evaluates; give "
                    "other servers, or remove evaluate.servers"
                )
        if rollout.overlap == "one_step":
            if rollout.colocated:
                raise ValueError(
                    "rollout.overlap=one_step: samples while a step trains, when servers have released their memory "
                    "with rollout.colocated=true; remove one of the two"
                )
            if self.loss.rollout_correction == "none":
                raise ValueError(
                    "rollout.overlap=one_step: trains on tokens that older weights sampled, which "
                    "loss.rollout_correction=none ignores; set it to tis or mis"
                )
        if rollout.colocated and self.sync.method == "distributed":
            raise ValueError(
                "sync.method=distributed: a process group cannot have two members on one GPU, as "
                "rollout.colocated=true needs; choose disk (sync.dir may be a folder in memory, such as /dev/shm/NAME) "
                "or tensor"
            )
        if rollout.engine == "embedded" and rollout.max_batch_tokens < self.max_sequence_tokens:
            raise ValueError(
                f"rollout.max_batch_tokens={rollout.max_batch_tokens}: cannot hold a sequence of "
                f"data.max_prompt_tokens={self.data.max_prompt_tokens} + "
                f"rollout.max_response_tokens={rollout.max_response_tokens}; raise it"
            )
        return self
