// What the operators compute, independent of ONNX Runtime and of the instruction set.
//
// A `Kernels` is a table of functions compiled for one instruction set. Every function computes one part of an operator
// (some rows, some panels, one tile), so that the caller may spread parts over threads. Results do not depend on how
// the work is cut: each number is made by the same operations in the same order, whatever else is in the batch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edge {

constexpr int64_t kPanel = 16;       // rows of a packed matrix that lie together
constexpr int64_t kBlockTokens = 32;  // tokens of a block of the KV cache
constexpr int64_t kSegment = 256;    // tokens whose scores are normalized together
constexpr int64_t kTileRows = 48;    // query vectors (tokens × heads) that one part of attention takes

using half = uint16_t;  // IEEE 754 binary16

// A matrix (rows, columns) of `scale · code + offset` in blocks of `block` columns, or of `scale · code`, or of halves;
// exporters/edge_weights.py packs it.
struct PackedMatrix {
  const uint8_t* data;
  int64_t rows, columns;
  int bits;   // 4: codes 0..15; 8: codes −128..127; 16: halves, and no constants
  int block;  // 16 or 32
  bool offsets;

  int64_t blocks() const { return columns / block; }
  int64_t panels() const { return (rows + kPanel - 1) / kPanel; }
  int64_t codes_bytes() const { return block * kPanel * bits / 8; }
  int64_t constants() const { return bits == 16 ? 0 : offsets ? 2 : 1; }
  int64_t block_bytes() const { return codes_bytes() + constants() * kPanel * int64_t(sizeof(half)); }
  int64_t panel_bytes() const { return blocks() * block_bytes(); }
  int64_t bytes() const { return panels() * panel_bytes(); }
};

enum class Gate : int { kNone = -1, kSilu = 0, kGeluTanh = 1, kGelu = 2 };

// What the weights of a product meet: x, gated and normed on the way, so that what lies between two products needs
// neither an operator nor memory of its own.
struct Input {
  const float* x;     // (tokens, width())
  int64_t columns;
  Gate gate;          // not kNone: x has 2 · columns, and gate(x[:, :columns]) · x[:, columns:] counts
  const float* norm;  // (columns): weight of a root-mean-square norm over the row; or null
  float epsilon;

  int64_t width() const { return gate == Gate::kNone ? columns : 2 * columns; }
};

// Activations (rows, columns) as integers with a scale per block: x ≈ scale · code. `sum` is scale · Σ code over a block,
// not Σ x: a block's codes of weights are all positive, so that rounding errors cancel only if its constant sees them too.
//
// With 8 bits a code is an int8_t, −127..127. With 16 bits and 4-bit weights each row stands twice, as two such digits: the
// row as above, and what it leaves over. That is twice the work of 8 bits, where 16-bit integers would be four times. With
// 8-bit weights, whose products with 8-bit codes overflow 16 bits anyway, a code is an int16_t, −32767..32767.
//
// Rows that meet the weights together lie together, block by block, so that one pointer finds all of them: codes are
// (tiles, blocks, rows of the tile, block), factors (tiles, blocks, 2, rows of the tile), scales before sums. How many rows
// a tile has, the instruction set decides; the last one has what is left.
//
// With halves for weights nothing is rounded: 32 bits, `codes` are floats (rows, columns), and there are no factors.
struct Activations {
  int bits;
  int digits;      // rows for each row of x: 1 or 2
  int64_t rows;    // over all digits
  void* codes;     // rows · columns
  float* factors;  // rows · blocks · 2
};

struct MatMul {
  PackedMatrix weight;
  Activations x;
  int64_t tokens;
  const float* bias;    // (weight.rows) or null
  const float* addend;  // (tokens, weight.rows) or null: added to the product
  float* y;             // (tokens, weight.rows)
};

// What keys and values are in the cache: halves, or int8_t with, behind them, a float for each token by which its codes
// are multiplied. What is stored as codes is turned before (attention.inl), which makes them finer.
enum class Stored { kHalf, kCodes };

struct Attention {
  int64_t heads, kv_heads, head_dim, rotary_dim;  // rotary_dim 0: no positions
  int64_t window;                                 // 0: none
  float scale, softcap, epsilon;                  // softcap 0: none
  bool interleaved;
  int64_t tokens, sequences, table_width;
  const float* qkv;         // (tokens, (heads + 2·kv_heads)·head_dim)
  const int32_t* begins;    // (sequences + 1)
  const int32_t* past;      // (sequences)
  const int32_t* table;     // (sequences, table_width)
  const int64_t* positions;  // (tokens): rows of cos and sin
  const float *cos, *sin;   // (…, rotary_dim / 2)
  const float *q_norm, *k_norm;  // (head_dim) or null
  uint8_t* cache;           // first block's keys of this layer
  int64_t block_stride;     // bytes from one block to the next
  int64_t cache_heads;      // heads of keys that a block has room for: those of the widest layer
  Stored stored;
  float* query;             // scratch (tokens, heads·head_dim): rotated and scaled
  float* y;                 // (tokens, heads·head_dim)

  int64_t group() const { return heads / kv_heads; }
  int64_t tile_tokens() const { return group() < kTileRows ? kTileRows / group() : 1; }
  int64_t position(int64_t sequence, int64_t token) const { return past[sequence] + token - begins[sequence]; }
  // The first position that the one at `position` sees.
  int64_t lowest(int64_t position) const { return window && position >= window ? position + 1 - window : 0; }
  int64_t wide_dim() const { return (head_dim + 31) / 32 * 32; }
  int64_t share_stride() const { return wide_dim() + 2; }  // floats of one row of a share
  // Bytes of a head's keys, or its values, in a block.
  int64_t head_bytes() const {
    return kBlockTokens * (stored == Stored::kHalf ? head_dim * int64_t(sizeof(half)) : head_dim + int64_t(sizeof(float)));
  }
  // Keys of one head in a block: (head_dim, kBlockTokens); values: (kBlockTokens, head_dim).
  uint8_t* keys(int64_t block, int64_t head) const { return cache + block * block_stride + head * head_bytes(); }
  uint8_t* values(int64_t block, int64_t head) const { return keys(block, cache_heads + head); }
};

// `count` tokens from `token` on, all of `sequence`, in the query heads of one KV head: count · group() rows.
struct Tile {
  int64_t sequence, token, count, kv_head;
};

struct Kernels {
  const char* instructions;
  bool (*supported)();
  // Rows [first, last) of the input.
  void (*quantize)(const Input& input, int64_t first, int64_t last, int block, const Activations& into);
  // Panels [first, last) of the product, all tokens.
  void (*matmul)(const MatMul& job, int64_t first, int64_t last);
  // Row `index` of the matrix as floats.
  void (*row)(const PackedMatrix& matrix, int64_t index, float* out);
  // Head norms and rotation of a token's queries and keys; keys and values go to the cache.
  void (*append)(const Attention& job, int64_t sequence, int64_t token);
  // Attention of a tile: `total` begins empty, joins the share of each segment of keys in their order, and is finished.
  // Totals and shares are (rows of the tile, share_stride()).
  void (*begin_share)(const Attention& job, const Tile& tile, float* total);
  void (*attend)(const Attention& job, const Tile& tile, int64_t segment, float* share);
  void (*join_share)(const Attention& job, const Tile& tile, float* total, const float* share);
  void (*finish_share)(const Attention& job, const Tile& tile, const float* total);
  // gate(x[:, :n]) · x[:, n:] for one row of 2·n.
  void (*gated_unit)(const float* x, int64_t n, Gate gate, float* out);
  // Multiply numbers that are in registers, and add them up: what the processor can do at most. They return how many.
  int64_t (*multiply_bytes)(int64_t rounds);
  int64_t (*multiply_floats)(int64_t rounds);
};

namespace avx2 {
extern const Kernels kernels;
}
namespace avxvnni {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

// The best table for this processor; null if there is none.
const Kernels* choose_kernels();

}  // namespace edge
