"""The keys that DeepSpeed 0.19 reads, because it ignores every other one without a word."""

from __future__ import annotations

TOP_LEVEL_KEYS: frozenset[str] = frozenset(
    [
        "activation_checkpointing",
        "aio",
        "autotuning",
        "bf16",
        "checkpoint",
        "comet",
        "comms_logger",
        "communication_data_type",
        "compile",
        "csv_monitor",
        "data_types",
        "datastates_ckpt",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "flops_profiler",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_allreduce_op",
        "gradient_clipping",
        "gradient_predivide_factor",
        "log_level",
        "managed_gradient_accumulation",
        "memory_breakdown",
        "optimizer",
        "prescale_gradients",
        "seq_parallel_communication_data_type",
        "steps_per_print",
        "tensorboard",
        "timers",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "use_data_before_expert_parallelism",
        "vocabulary_size",
        "wall_clock_breakdown",
        "wandb",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    ]
)

_REMOVED = "removed from DeepSpeed 0.19; leave it out"

REFUSED_KEYS: dict[str, str] = {
    "scheduler": "lr_scheduler_type, warmup_steps and warmup_ratio own the learning rate; leave it out",
    "torch_autocast": "dtype owns the precision, and bf16 or fp16 carries it out; leave it out",
    "bfloat16": "older name of bf16; rename it",
    "hybrid_engine": "serves generation during training, which these methods do not use; leave it out",
    "pipeline": "pipeline parallelism cannot be joined with ZeRO-3 and packed micro-batches; leave it out",
    "tensor_parallel": "not supported together with packed micro-batches; leave it out",
    "expert_parallel": "not supported together with packed micro-batches; leave it out",
    "sequence_parallel_size": "not supported together with packed micro-batches; leave it out",
    "weight_quantization": "the weights no longer fit the model's shapes here; leave it out, and give "
    "--ref_load_in_8bit or --ref_load_in_4bit to hold the reference in few bits",
    "data_efficiency": "the packer owns the data's order; leave it out",
    "dataloader_drop_last": "the packer owns the data and drops nothing; leave it out",
    **dict.fromkeys(
        [
            "amp",
            "compression_training",
            "curriculum_learning",
            "eigenvalue",
            "elasticity",
            "graph_harvesting",
            "nebula",
            "progressive_layer_drop",
            "quantize_training",
            "sparse_attention",
            "sparse_gradients",
        ],
        _REMOVED,
    ),
}

SECTION_KEYS: dict[tuple[str, ...], frozenset[str]] = {
    ("zero_optimization",): frozenset(
        [
            "allgather_bucket_size",
            "allgather_partitions",
            "compute_grad_norm",
            "contiguous_gradients",
            "enable_sanity_checks",
            "ignore_unused_parameters",
            "leaf_module",
            "legacy_stage1",
            "load_from_fp32_weights",
            "log_trace_cache_warnings",
            "memory_efficient_linear",
            "offload_optimizer",
            "offload_param",
            "overlap_comm",
            "override_module_apply",
            "parameter_alignment",
            "pipeline_loading_checkpoint",
            "reduce_bucket_size",
            "reduce_scatter",
            "round_robin_gradients",
            "save_muon_momentum_buffer_in_memory",
            "stage",
            "stage3_allgather_sequential",
            "stage3_gather_16bit_weights_on_model_save",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "stage3_model_persistence_threshold",
            "stage3_module_granularity_threshold",
            "stage3_param_persistence_threshold",
            "stage3_prefetch_bucket_size",
            "stage3_use_all_reduce_for_fetch_params",
            "sub_group_size",
            "use_multi_rank_bucket_allreduce",
            "zenflow",
            "zero_hpz_partition_size",
            "zero_quantized_gradients",
            "zero_quantized_nontrainable_weights",
            "zero_quantized_weights",
        ]
    ),
    ("zero_optimization", "offload_param"): frozenset(
        ["buffer_count", "buffer_size", "device", "max_in_cpu", "nvme_path", "pin_memory"]
    ),
    ("zero_optimization", "offload_optimizer"): frozenset(
        [
            "buffer_count",
            "cpuadam_cores_perc",
            "device",
            "fast_init",
            "nvme_path",
            "pin_memory",
            "pipeline_read",
            "pipeline_write",
            "ratio",
            "super_offload",
        ]
    ),
    ("bf16",): frozenset(
        [
            "bf16_master_weights_and_grads",
            "bf16_optimizer_states",
            "check_grad_overflow",
            "enabled",
            "immediate_grad_update",
        ]
    ),
    ("fp16",): frozenset(
        [
            "auto_cast",
            "consecutive_hysteresis",
            "enabled",
            "fp16_master_weights_and_grads",
            "hysteresis",
            "initial_scale_power",
            "loss_scale",
            "loss_scale_window",
            "min_loss_scale",
        ]
    ),
    ("optimizer",): frozenset(("type", "params")),
    ("aio",): frozenset(
        ["block_size", "intra_op_parallelism", "overlap_events", "queue_depth", "single_submit", "use_gds"]
    ),
    ("data_types",): frozenset(("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules")),
}
