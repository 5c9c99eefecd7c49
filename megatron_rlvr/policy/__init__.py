from megatron_rlvr.distributed import accelerator as platform

platform.import_megatron()  # before a module of this package does
