"""Cases that are slow because a twin of each stays in the quick suite: other parameters, or a test much like it.

By node id; `tests/conftest.py` marks them. Here, and not beside each test, because it is the list that is weighed: it
changes with what the whole suite takes.
"""

SLOW_TWINS = frozenset(
    {
        "test_bench.py::test_resnet_has_a_second_baseline",
        "test_budget.py::test_training_keeps_to_the_budget[bits-3.0]",
        "test_budget.py::test_training_keeps_to_the_budget[bytes-500.0]",
        "test_configs.py::test_smoke_trains[cifar10_resnet20_cpt]",
        "test_configs.py::test_smoke_trains[tiny_shakespeare_transformer_cpt]",
        "test_configs.py::test_two_steps[digits_cnn_static]",
        "test_configs.py::test_two_steps[digits_cnn_trs]",
        "test_configs.py::test_two_steps[digits_gcn_cpt]",
        "test_configs.py::test_two_steps[digits_mobilenet_cpt]",
        "test_configs.py::test_two_steps[digits_vit_cpt]",
        "test_configs.py::test_two_steps[imagenette_resnet_nested]",
        "test_configs.py::test_two_steps[mnist_cnn_cpt]",
        "test_configs.py::test_two_steps[mnist_mlp_nested]",
        "test_configs.py::test_two_steps[sequential_digits_s5_cpt]",
        "test_controllers_training.py::test_a_resumed_run_is_bit_identical[muppet]",
        "test_controllers_training.py::test_points_share_a_program[vmap]",
        "test_deficits.py::test_a_sweep_shares_the_program",
        "test_export.py::test_a_loaded_digits_cnn_gives_the_numbers_of_the_evaluation_step[lsq]",
        "test_export.py::test_a_loaded_scan_of_transformer_blocks_computes_the_logits_of_evaluation[symmetric-False]",
        "test_foreign_models.py::test_a_foreign_model[recurrent]",
        "test_inject_learned.py::test_learned_parameters_begin_are_calibrated_and_get_a_gradient[vmap]",
        "test_inject_transforms.py::test_one_and_eight_devices_agree",
        "test_integer.py::test_convolutions[1]",
        "test_learned_training.py::test_a_run_begins_with_the_float_parameters_and_quantizers_made_for_them",
        "test_learned_training.py::test_dampening_draws_weights_to_the_middle_of_their_bins",
        "test_learned_training.py::test_the_quantizers_have_a_learning_rate_and_a_decay_of_their_own",
        "test_methods_trs.py::test_weight_scales_stand_still_and_activation_scales_learn[adam]",
        "test_models.py::test_training[cnn, max pooling, no norm]",
        "test_models.py::test_training[transformer, rotary, rms, swiglu]",
        "test_multi_precision.py::test_accumulated_is_one_step_of_the_mean_gradient",
        "test_multi_precision.py::test_resumes_within_a_round_bit_for_bit",
        "test_native_paths.py::test_in_every_transformation[requantized]",
        "test_nnx.py::test_values_and_gradients_are_the_linen_twins_with_one_trace_for_all_widths[lstm]",
        "test_quantizers_contraction.py::test_in_every_transformation[folded]",
        "test_quantizers_contraction.py::test_in_every_transformation[original]",
        "test_quantizers_contraction.py::test_in_every_transformation[requantized]",
        "test_resume.py::test_resumed_equals_uninterrupted[initial SIGTERM-75-checkpoints8]",
        "test_resume.py::test_resumed_equals_uninterrupted[saving 9-75-checkpoints10]",
        "test_resume.py::test_resumed_equals_uninterrupted[unfinished--9-checkpoints6]",
        "test_resume.py::test_resumed_equals_uninterrupted[unsealed 2--9-checkpoints3]",
        "test_s5.py::test_the_naive_parametrisation_is_the_same_function_and_breaks_at_4_bits[zoh]",
        "test_train.py::test_aqt_backend_trains_as_qtrain_with_its_grid[digits_cnn-4]",
    }
)
