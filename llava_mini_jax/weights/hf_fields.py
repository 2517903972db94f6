"""Fields of Hugging Face's config.json that change no number, and files beside it that do.

What a config.json says is either read (hf_config.py), or listed here as harmless, or refused by
name. The lists are of the fields that configuration classes of transformers 4.31 to 5.24, LLaVA's
training scripts and common fine-tuning tools write.
"""


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Every configuration class of transformers may write these; none changes a forward pass.
BOOKKEEPING = words(
    """
    _name_or_path _commit_hash _attn_implementation _attn_implementation_autoset
    _attn_implementation_internal _experts_implementation _flash_attn_2_enabled
    attn_implementation architectures model_type transformers_version torch_dtype dtype use_cache
    return_dict output_hidden_states output_attentions torchscript use_bfloat16 tf_legacy_loss
    chunk_size_feed_forward is_decoder finetuning_task id2label label2id num_labels problem_type
    task_specific_params tokenizer_class prefix bos_token_id eos_token_id pad_token_id sep_token_id
    unk_token_id decoder_start_token_id max_length min_length do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens gradient_checkpointing initializer_range initializer_factor
    attention_dropout dropout
    """
)
# A language model's: lengths that only tokenizers heed, and notes of tools that passed by.
LLM_HARMLESS = BOOKKEEPING | words(
    """
    pretraining_tp max_sequence_length model_max_length is_llama_config transformers.js_config
    unsloth_fixed unsloth_version
    """
)
CLIP_HARMLESS = BOOKKEEPING | words("projection_dim vocab_size tie_word_embeddings")

# Those of parts go with image_aspect_ratios that are refused; tensors say the width.
LLAVA_HARMLESS = LLM_HARMLESS | words(
    """
    mm_hidden_size mm_use_im_patch_token image_grid_pinpoints image_crop_resolution
    image_split_resolution mm_tunable_parts vision_tower_pretrained
    """
)
LLAVA_HF_HARMLESS = BOOKKEEPING | words(
    "image_token_index image_token_id image_seq_length ignore_index vocab_size"
)
# What LLaVA's training scripts leave behind: how a model was trained, not what it computes.
TRAINING_NOTES = (r"(un)?freeze_\w+", r"tune_\w+", r"\w+_lr", r"pretrain_\w+")

# Files that say that the weights beside them are not the model's own numbers.
_QUANTIZED_FILE = (
    "its weights are quantized, which cannot be read; give the folder of the original model"
)
FOREIGN_FILES = {
    "hf_quant_config.json": _QUANTIZED_FILE,
    "quantize_config.json": _QUANTIZED_FILE,
    "quant_config.json": _QUANTIZED_FILE,
}
