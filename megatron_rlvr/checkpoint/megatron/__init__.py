from megatron_rlvr.distributed import megatron_on_cpu

megatron_on_cpu.import_megatron()  # must run before any module of this package imports megatron
