from megatron_rlvr.distributed import megatron_on_cpu

megatron_on_cpu.import_megatron()  # before a module of this package does
