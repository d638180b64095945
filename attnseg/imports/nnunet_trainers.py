"""Trainers of nnU-Net whose models run as the plans say.

Source: nnunetv2/training/nnUNetTrainer of nnU-Net 2.8.1. They differ from `nnUNetTrainer` in
augmentation, loss, optimiser, schedule, sampling, deep supervision or mirror axes. At inference,
their network is that of the plans, without deep supervision; `nnUNetTrainerBN` replaces its norms
(`build_nnunet`). The mirror axes are in the checkpoint. The trainers of Primus have networks of
their own.
"""

from __future__ import annotations

import re

_TRAINERS = frozenset(
    {
        "nnUNetTrainer",
        "nnUNetTrainerAdam",
        "nnUNetTrainerAdam1en3",
        "nnUNetTrainerAdam3en4",
        "nnUNetTrainerAdan",
        "nnUNetTrainerAdan1en1",
        "nnUNetTrainerAdan1en3",
        "nnUNetTrainerAdan3en4",
        "nnUNetTrainerAdanCosAnneal",
        "nnUNetTrainerBN",
        "nnUNetTrainerBenchmark_5epochs",
        "nnUNetTrainerBenchmark_5epochs_noDataLoading",
        "nnUNetTrainerCELoss",
        "nnUNetTrainerCELoss_5epochs",
        "nnUNetTrainerCosAnneal",
        "nnUNetTrainerDA5",
        "nnUNetTrainerDA5Segord0",
        "nnUNetTrainerDA5_10epochs",
        "nnUNetTrainerDA5ord0",
        "nnUNetTrainerDiceCELoss_noSmooth",
        "nnUNetTrainerDiceLoss",
        "nnUNetTrainerDiceTopK10Loss",
        "nnUNetTrainerNoDA",
        "nnUNetTrainerNoDeepSupervision",
        "nnUNetTrainerNoMirroring",
        "nnUNetTrainerTopk10Loss",
        "nnUNetTrainerTopk10LossLS01",
        "nnUNetTrainerVanillaAdam",
        "nnUNetTrainerVanillaAdam1en3",
        "nnUNetTrainerVanillaAdam3en4",
        "nnUNetTrainer_DASegOrd0",
        "nnUNetTrainer_DASegOrd0_NoMirroring",
        "nnUNetTrainer_noDummy2DDA",
        "nnUNetTrainer_onlyMirror01",
        "nnUNetTrainer_onlyMirror01_1500ep",
        "nnUNetTrainer_onlyMirror01_DA5",
        "nnUNetTrainer_onlyMirror01_DASegOrd0",
        "nnUNetTrainer_probabilisticOversampling",
        "nnUNetTrainer_probabilisticOversampling_010",
        "nnUNetTrainer_probabilisticOversampling_033",
        "nnUNetTrainer_warmup",
        "nnUNet_Trainer_BS8",
    }
)
_EPOCHS = re.compile(r"nnUNetTrainer_([0-9]+epochs(_NoMirroring)?|1epoch)")
"""Names by the number of epochs, of which nnU-Net has a dozen."""


def is_own_trainer(name: str) -> bool:
    """Whether a trainer is nnU-Net's own, with the plans' network at inference."""
    return name in _TRAINERS or _EPOCHS.fullmatch(name) is not None
