// Compiled once for each instruction set, with -DMLMFAST_PATH=<name>; see isa.cpp.
#include "kernels.h"

#include "add_layer_norm_kernel.h"
#include "attention_kernel.h"
#include "few_rows_kernel.h"
#include "masked_embedding_kernel.h"
#include "rotary_kernel.h"
#include "vocab_kernel.h"

#define MLMFAST_JOIN(a, b) a##b
#define MLMFAST_TABLE(path) MLMFAST_JOIN(path, _kernels)
#define MLMFAST_QUOTE(path) #path
#define MLMFAST_NAME(path) MLMFAST_QUOTE(path)

extern const mlmfast::Kernels mlmfast::MLMFAST_TABLE(MLMFAST_PATH) = {
    MLMFAST_NAME(MLMFAST_PATH),
    {attention_scratch<FloatProduct>, attention_scratch<HalfProduct>},
    {attention_item<float, FloatProduct>, attention_item<bf16, HalfProduct>},
    {table_bytes<FloatProduct>, table_bytes<HalfProduct>},
    {pack_table<float, FloatProduct>, pack_table<bf16, HalfProduct>},
    {rotary<float>, rotary<bf16>},
    {add_layer_norm<float>, add_layer_norm<bf16>},
    {masked_embedding<float>, masked_embedding<bf16>},
    few_rows,
    {vocab_sums<float>, vocab_sums<bf16>},
    {vocab_logit<float>, vocab_logit<bf16>},
    {vocab_above<float>, vocab_above<bf16>},
    {vocab_best<float>, vocab_best<bf16>},
};
