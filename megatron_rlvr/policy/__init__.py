from megatron_rlvr import platform

platform.import_megatron()  # before a module of this package does
