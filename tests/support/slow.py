"""Tests that `make test` leaves to `make test-all`: rows of a kind of which it runs others.

What is here takes seconds and repeats, for another model, precision, shape, page or form of a graph, what a test that
is not here does. A kind that is tested once stays out of it, however long it takes, and so does a bug in the form in
which it is found first. What `make test` sees of the support matrix is held to the page all the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

SLOW = {
    # The page in other colours at another width, and of other kinds of packages.
    "runner/serve/test_page.py": (
        "test_it_fits_and_can_be_used_by_everybody[False-1280]",
        "test_it_fits_and_can_be_used_by_everybody[True-360]",
        "test_a_classifier_says_what_to_use",
        "test_a_model_without_a_chat_template_goes_on_with_a_text",
    ),
    # Another architecture, or another variant of it: OLMo 1 is run whole, and each model in one or two forms.
    "exporter/package/test_family_quality.py": ("test_quantised_it_holds_the_gates_of_quality",),
    "exporter/family/test_family.py": (
        "test_every_graph_for_tensorrt_computes_what_its_weights_say[olmo3-int4",
        "test_every_variant_computes_what_its_weights_say[olmo3]",
        "test_every_variant_computes_what_its_weights_say[olmo2]",
        "test_other_shapes_and_every_rope_pass_parity[Olmo 3, all sliding]",
        "test_other_shapes_and_every_rope_pass_parity[OLMo 1, tied and biased, linear]",
        "test_other_shapes_and_every_rope_pass_parity[longrope]",
        "test_other_shapes_and_every_rope_pass_parity[dynamic]",
        "test_what_an_export_writes_is_predicted[olmo]",
        "test_every_graph_for_tensorrt_computes_what_its_weights_say[olmo-",
        "test_every_graph_for_tensorrt_computes_what_its_weights_say[olmo3-fp8",
        "test_every_graph_for_tensorrt_computes_what_its_weights_say[olmo3-int8",
        "test_every_graph_for_tensorrt_computes_what_its_weights_say[olmo3-fp16",
        "test_by_layer_it_is_verified_too[olmo]",
        "test_every_variant_computes_what_its_weights_say[olmo]",
        "test_what_an_export_writes_is_predicted[olmo3]",
        "test_other_shapes_and_every_rope_pass_parity[llama3]",
        "test_by_layer_it_is_verified_too[olmo3]",
        "test_every_graph_for_tensorrt_computes_what_its_weights_say[olmo3-bf16",
    ),
    "exporter/family/test_family_bugs.py": (
        "test_bug_in_the_decode_graph[olmo3-yarn_in_no_layer",
        "test_bug_in_the_decode_graph[olmo-clip_has_another_limit",
        "test_bug_in_the_decode_graph[olmo-layer_norm_ignored",
        "test_bug_in_the_graph_for_tensorrt[olmo3-window_without_the_token_itself",
        "test_bug_in_the_graph_for_tensorrt[olmo3-attention_factor_of_yarn_forgotten]",
        "test_bug_in_the_graph_for_tensorrt[olmo3-yarn_in_all_layers]",
        "test_bug_in_the_portable_graph[olmo3-attention_factor_of_yarn_forgotten]",
        "test_bug_in_the_decode_graph[olmo3-attention_factor_of_yarn_forgotten]",
        "test_bug_in_the_decode_graph[olmo3-full_layer_has_a_window]",
        "test_bug_in_the_decode_graph[olmo3-window_without_the_token_itself]",
        "test_bug_in_the_decode_graph[olmo-last_norm_has_another_epsilon]",
    ),
    "exporter/heads/test_hidden_states.py": (
        "test_fp32_gives_what_transformers_does[olmo3",
        "test_the_files_are_predicted_to_the_byte[olmo3",
        "test_every_variant_passes_its_gates[olmo2]",
        "test_every_variant_passes_its_gates[olmo3]",
        "test_another_hidden_state_is_red_and_named[q4-",
        "test_another_hidden_state_is_red_and_named[bf16-",
        "test_graphs_for_tensorrt_give_them[int8]",
        "test_graphs_for_tensorrt_give_them[bf16]",
    ),
    "exporter/heads/test_inputs_embeds.py": (
        "test_tokens_vectors_and_tokens_give_what_transformers_does[olmo3",
        "test_every_variant_passes_its_gates[olmo2]",
        "test_every_variant_passes_its_gates[olmo3]",
        "test_tokens_vectors_and_tokens_give_what_transformers_does[olmo2]",
        "test_vectors_that_are_ignored_are_red_and_named[q4]",
        "test_graphs_for_tensorrt_take_them[int4]",
        "test_graphs_for_tensorrt_take_them[bf16]",
    ),
    "exporter/heads/test_classifiers.py": (
        "test_fp32_scores_what_transformers_does[olmo2_reward",
        "test_every_variant_passes_its_gates[olmo2]",
        "test_every_variant_passes_its_gates[olmo3]",
        "test_fp32_scores_what_transformers_does[olmo]",
        "test_fp32_scores_what_transformers_does[olmo3]",
        "test_the_files_are_predicted_to_the_byte[olmo2]",
        "test_the_files_are_predicted_to_the_byte[olmo3]",
        "test_every_graph_for_tensorrt_passes_its_gates[fp8]",
        "test_every_graph_for_tensorrt_passes_its_gates[int8]",
        "test_every_graph_for_tensorrt_passes_its_gates[int4]",
        "test_every_graph_for_tensorrt_passes_its_gates[fp16]",
        "test_every_graph_for_tensorrt_passes_its_gates[bf16]",
    ),
    "exporter/heads/test_generations.py": (
        "test_their_outputs_pass_their_gates[olmo-hidden-vectors]",
        "test_their_outputs_pass_their_gates[olmo-score]",
        "test_their_outputs_pass_their_gates[olmo3-hidden-vectors]",
        *(
            f"test_tensorrt_compiles_it[{row}-"
            for row in ("olmo-score", "olmo-hidden-vectors", "olmo2", "olmo3-score", "olmo3-hidden-vectors")
        ),
        "test_every_other_variant_passes_its_gates",
        *(f"test_tensorrt_compiles_it[olmo-plain-{p}]" for p in ("fp16", "fp32", "int4", "int8", "fp8")),
        *(f"test_tensorrt_compiles_it[olmo3-plain-{p}]" for p in ("bf16", "fp16", "fp32", "int8", "fp8")),
    ),
    "exporter/heads/test_head_bugs.py": (
        "test_a_bug_of_the_head_is_red_and_named[q4-",
        "test_a_bug_of_the_head_is_red_and_named[fp32-pooled_at_the_last_token]",
    ),
    "exporter/heads/test_states_of_vectors.py": (
        "test_every_form_is_compared_on_vectors",
        "test_a_state_that_ignores_vectors_is_red_and_named[q4]",
        "test_a_state_that_ignores_vectors_is_red_and_named[trt_fp32]",
    ),
    # Another precision or layout of heads of an engine, which TensorRT compiles for seconds.
    "exporter/engine/test_engine_plan.py": (
        "test_kernels_of_profile_latency[40/8-bf16",
        "test_kernels_of_every_precision_and_head_layout[16/16-fp32",
        "test_kernels_of_every_precision_and_head_layout[40/8-",
        "test_kernels_of_every_precision_and_head_layout[16/16-bf16",
        "test_kernels_of_every_precision_and_head_layout[16/16-int8",
        "test_kernels_of_every_precision_and_head_layout[16/16-fp8",
        "test_kernels_of_profile_latency[16/16-fp8",
        "test_kernels_of_profile_latency[16/16-int8",
        "test_kernels_of_profile_latency[16/16-bf16",
        "test_kernels_of_every_precision_and_head_layout[16/16-fp16",
    ),
    "exporter/engine/test_renew.py": (
        "test_an_engine_of_another_kind_is_not_taken",
        "test_what_cannot_be_refitted_is_built_each_time_and_not_for_refitting[int8-trt]",
    ),
    "exporter/verify/test_verify_static.py": (
        "test_a_quantised_graph_computes_what_its_weights_say[fp8]",
        "test_a_quantised_graph_computes_what_its_weights_say[int8]",
        "test_a_rounded_graph_passes[fp16]",
        "test_the_demo_meets_the_gates_of_quality[fp8",
        "test_the_demo_meets_the_gates_of_quality[int8",
        "test_bug_turns_verify_red[fp8-query_and_key_split",
        "test_the_demo_meets_the_gates_of_quality[int4",
        "test_bug_turns_verify_red[int4-query_and_key_split",
        "test_bug_turns_verify_red[fp8-one_channel_scale_wrong",
        "test_bug_turns_verify_red[int8-one_channel_scale_wrong",
        "test_bug_turns_verify_red[int8-eps_ten_times",
        "test_bug_turns_verify_red[int8-inputs_not_quantised",
    ),
    "exporter/graphs/test_trt_graph.py": (
        "test_token_by_token_equals_the_full_forward[odd",
        "test_token_by_token_equals_the_full_forward[mqa",
        "test_prefill_gives_the_logits_of_the_wanted_row[odd]",
        "test_prefill_gives_the_logits_of_the_wanted_row[tied]",
        "test_prefill_gives_the_logits_of_the_wanted_row[bias]",
        "test_prefill_gives_the_logits_of_the_wanted_row[mqa]",
    ),
    # A bug of the portable graph in another graph; q4's own forms of each kind stay.
    "exporter/verify/test_verify_quantized.py": (
        "test_the_demo_passes_all_with_gptq_and_an_8_bit_cache",
        "test_one_extreme_weight_is_no_false_alarm",
        "test_a_bug_beside_an_extreme_weight_is_red[q_norm_ignored-onnx/model_q4_prefill",
        "test_a_bug_beside_an_extreme_weight_is_red[kv_heads_misread",
        "test_a_bug_beside_an_extreme_weight_is_red[attention_scale_wrong",
        "test_a_bug_beside_an_extreme_weight_is_red[key_and_value_cache_swapped",
        "test_bug_in_the_prefill_graph_turns_it_red[kv_heads_misread",
        "test_bug_in_the_prefill_graph_turns_it_red[key_and_value_cache_swapped",
        "test_bug_in_the_prefill_graph_turns_it_red[post_attention_norm_ignored",
        "test_bug_in_the_portable_graph_turns_it_red_and_no_other[kv_heads_misread",
        "test_bug_in_the_portable_graph_turns_it_red_and_no_other[attention_scale_wrong",
        "test_bug_in_the_portable_graph_turns_it_red_and_no_other[gate_and_up_swapped",
        "test_bug_in_the_portable_graph_turns_it_red_and_no_other[post_attention_norm_ignored",
        "test_bug_in_the_portable_graph_turns_it_red_and_no_other[eps_ten_times_too_large",
        "test_wrong_weights_turn_the_weights_check_red[nibbles_swapped]",
        "test_wrong_weights_turn_the_weights_check_red[zero_points_ignored]",
        "test_wrong_weights_turn_the_weights_check_red[tensor_zeroed]",
        "test_a_rebuilt_package_without_a_bug_is_red_in_nothing_but_quality",
        "test_bug_in_the_portable_graph_turns_it_red_and_no_other[attention_sees_a_window",
        "test_bug_in_the_portable_graph_turns_it_red_and_no_other[key_and_value_cache_swapped",
        "test_bug_in_the_portable_graph_turns_it_red_and_no_other[rope_interleaved",
        "test_a_bug_beside_an_extreme_weight_is_red[one_scale_shifted",
    ),
    "exporter/verify/test_verify.py": (
        "test_every_form_of_checkpoint_verifies[eps-theta]",
        "test_every_form_of_checkpoint_verifies[head-dim]",
        "test_every_form_of_checkpoint_verifies[mqa-bias]",
    ),
    "exporter/verify/test_verify_by_layer.py": (
        "test_both_ways_give_the_same_numbers[q4]",
        "test_both_ways_give_the_same_numbers[fp32]",
    ),
    "exporter/locate/test_locate.py": (
        "test_nothing_departs_in_the_demo",
        "test_nothing_departs_in_the_quantised_demo",
        "test_nothing_departs_in_other_shapes[tied, no groups]",
        "test_nothing_departs_in_other_shapes[one KV head, biases]",
    ),
    "exporter/package/test_plan.py": (
        "test_every_variant_is_predicted_to_the_byte[padded]",
        "test_every_variant_is_predicted_to_the_byte[tied]",
        "test_of_a_hub_only_texts_and_headers_are_read",
        "test_a_budget_is_an_upper_bound",
    ),
    "exporter/package/test_variants.py": (
        "test_two_exports_are_byte_identical",
        "test_odd_shapes_export_and_verify_exactly[no multiple of a block]",
        "test_odd_shapes_export_and_verify_exactly[odd vocabulary and layers]",
        "test_one_command_makes_both_variants_of_the_demo",
        "test_odd_shapes_export_and_verify_exactly[tied and biased]",
        "test_odd_shapes_export_and_verify_exactly[short context]",
    ),
    "exporter/package/test_linked_package.py": (
        "test_it_is_verified_located_and_evaluated[by_hash]",
        "test_a_build_without_hard_links_copies",
        "test_it_is_verified_located_and_evaluated[hub_cache]",
    ),
    "exporter/quantize/test_quantize_recipes.py": (
        "test_the_demo_is_within_its_gates[gptq-BlockFormat(bits=4, block_size=128, symmetric=True, positive=False)-"
        "BlockFormat(bits=8",
        "test_the_demo_is_within_its_gates[search-BlockFormat(bits=4, block_size=128, symmetric=True, positive=False)-"
        "BlockFormat(bits=8",
        "test_the_demo_is_within_its_gates[gptq-BlockFormat(bits=4, block_size=128, symmetric=True, positive=False)-"
        "BlockFormat(bits=4",
    ),
    "runner/speculate/test_speculate.py": (
        "test_sampled_texts_have_the_samplers_distribution[unlikely-",
        "test_sampled_texts_have_the_samplers_distribution[likely-",
        "test_sampled_texts_have_the_samplers_distribution[mixed-{'temperature': 2.0",
        "test_texts_are_those_without_speculation[0.8-",
        "test_sampled_texts_have_the_samplers_distribution[mixed-{'temperature': 1.2",
    ),
    "exporter/graphs/test_repeat_layers.py": (
        "test_the_graph_is_that_of_a_trace_of_all_layers[olmo2",
        "test_the_graph_is_that_of_a_trace_of_all_layers[score",
        "test_the_graph_is_that_of_a_trace_of_all_layers[one layer",
        "test_the_graph_is_that_of_a_trace_of_all_layers[sliding first",
    ),
    "exporter/graphs/test_trace.py": ("test_what_the_tests_share_is_what_is_traced",),
    "exporter/test_cli.py": (
        "test_bf16_is_verified_where_onnxruntime_has_none",
        "test_a_verdict_on_an_earlier_graph_is_not_shown",
    ),
    "exporter/engine/test_engine.py": ("test_one_row_stores_linear_weights_twice",),
    "runner/test_telemetry.py": ("test_export_verify_and_a_run_leave_the_home_as_it_was",),
    "repository/test_platforms.py": ("test_a_package_is_exported_and_replaced",),
    "repository/test_gpu_rows.py": ("test_rows_go_on_in_another_process_after_one_that_failed_hung_or_died",),
    # Another page of the documents, another look at the whole demo, a benchmark of more rows.
    "repository/test_docs.py": tuple(
        f"test_the_commands_and_the_python_of_a_page_run[docs/{page}.md]"
        for page in ("report", "getting-started", "benchmarks", "variants", "gpu", "verify", "evaluate")
    ),
    "repository/test_demo.py": ("test_held_out_perplexity_is_the_model_cards",),
    "exporter/bench/test_bench.py": (
        "test_stages",
        "test_gpu_table_on_a_processor",
        "test_quality_of_the_variant_of_8_bits",
    ),
    "exporter/bench/test_bench_compare.py": ("test_transformers_beside_ours",),
    "exporter/evaluate/test_sweep_revisions.py": (
        "test_patterns_on_the_command_line",
        "test_a_quantised_variant_is_quantised_anew",
        "test_engines_of_a_sweep_are_built_once_and_refitted",
        "test_an_engine_that_is_there_is_kept_and_one_of_another_gpu_or_tensorrt_is_not",
        "test_each_is_what_an_export_of_its_own_gives",
    ),
}
"""file -> tests, or what their names begin with"""

UNKNOWN: list[str] = []
"""of these, those that this run's collection has not"""


def mark_slow(items: Sequence[pytest.Item]) -> None:
    """Mark the tests above, and say in `UNKNOWN` which are in no file that was collected."""
    found: dict[str, list[str]] = {}
    for item in items:
        file, _, name = item.nodeid.partition("::")
        found.setdefault(file.removeprefix("tests/"), []).append(name)
        if name.startswith(SLOW.get(file.removeprefix("tests/"), ()) or ("::",)):
            item.add_marker(pytest.mark.slow)
    UNKNOWN.clear()
    if not SLOW.keys() - found.keys():  # a run of some files collects no others
        UNKNOWN.extend(
            f"{file}::{start}"
            for file, starts in SLOW.items()
            for start in starts
            if not any(name.startswith(start) for name in found[file])
        )
