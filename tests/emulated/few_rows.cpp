// The CUDA kernels for few rows run on the host, block after block: C functions for ctypes.
#include "../../csrc/cuda/linear_kernel.h"
#include "../../csrc/cuda/masked_embedding_kernel.h"
#include "../../csrc/cuda/vocab_topk_kernel.h"

using namespace mlmfast::cuda;

namespace {

constexpr char UNWRITTEN = 0x7f;  // large numbers in shared memory, until a kernel writes others

template <int MT, int NT, class T>
void run_linear(const Linear& a) {
  const int warps = linear_warps(a.width, a.outputs);
  for (int tile = 0; tile * TILE_OUTPUTS < a.outputs; ++tile) {
    std::vector<char> memory(linear_bytes(warps, MT, NT), UNWRITTEN);
    Block::run(32 * warps, [&] { linear_tile<MT, NT, T>(a, tile, memory.data()); });
  }
}

template <int MT, class T>
void run_linear(const Linear& a) {
  a.rows <= 8 ? run_linear<MT, 1, T>(a) : a.rows <= 16 ? run_linear<MT, 2, T>(a) : run_linear<MT, 4, T>(a);
}

template <class T>
void run_linear(const Linear& a) {
  a.activation == Activation::GEGLU ? run_linear<2, T>(a) : run_linear<1, T>(a);
}

template <int NT, class T>
void run_parts(const VocabTopk& a) {
  for (int part = 0; part < a.parts; ++part) {
    std::vector<char> memory(TopkLayout<NT>::BYTES, UNWRITTEN);
    Block::run(TOPK_THREADS, [&] { topk_part<NT, T>(a, part, memory.data()); });
  }
}

template <class T>
void run_parts(const VocabTopk& a) {
  a.rows <= 8 ? run_parts<1, T>(a) : a.rows <= 16 ? run_parts<2, T>(a) : run_parts<4, T>(a);
}

// `row(i, memory)` for each row, with a norm's threads.
template <class Row>
void run_rows(int rows, int width, const Row& row) {
  for (int i = 0; i < rows; ++i) {
    std::vector<char> memory(row_bytes(width), UNWRITTEN);
    Block::run(NORM_THREADS, [&] { row(i, memory.data()); });
  }
}

}  // namespace

extern "C" void linear(const Linear* a, int half) { half ? run_linear<float16>(*a) : run_linear<bfloat16>(*a); }

extern "C" int parts_of(int tokens) { return topk_parts(tokens); }

extern "C" void vocab_topk(const VocabTopk* a, int half) {
  half ? run_parts<float16>(*a) : run_parts<bfloat16>(*a);
  for (int row = 0; row < a->rows; ++row) {
    std::vector<char> memory(TopkRowLayout::BYTES, UNWRITTEN);
    Block::run(TOPK_THREADS, [&] { topk_row(*a, row, memory.data()); });
  }
}

extern "C" void add_layer_norm(const AddLayerNorm* a, int rows, int half) {
  run_rows(rows, a->width, [&](int i, char* memory) {
    half ? add_layer_norm_row<float16>(*a, i, memory) : add_layer_norm_row<bfloat16>(*a, i, memory);
  });
}

extern "C" void masked_embedding(const MaskedEmbedding* a, int rows, int half) {
  run_rows(rows, a->width, [&](int i, char* memory) {
    half ? masked_embedding_row<float16>(*a, i, memory) : masked_embedding_row<bfloat16>(*a, i, memory);
  });
}
