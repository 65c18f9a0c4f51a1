// Attention over the paged KV cache as an operator: its inputs checked, its work cut into parts.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "ort_context.h"
#include "scratch.h"

namespace edge {

using ort::Element;

class PagedAttention {
 public:
  static constexpr const char* kName = "PagedAttention";
  static constexpr Element kInputs[] = {Element::kFloat, Element::kUint8, Element::kInt32, Element::kInt32,
                                        Element::kInt32, Element::kInt64,   Element::kFloat, Element::kFloat,
                                        Element::kFloat, Element::kFloat};
  static constexpr size_t kRequired = 6;

  explicit PagedAttention(const Attributes& attributes) : layer_(attributes.integer("layer")) {
    base_.heads = attributes.integer("num_heads");
    base_.kv_heads = attributes.integer("kv_num_heads");
    base_.head_dim = attributes.integer("head_dim");
    base_.interleaved = attributes.integer("rotary_interleaved") != 0;
    base_.window = attributes.integer("window");
    base_.scale = attributes.real("scale");
    base_.softcap = attributes.real("softcap");
    base_.epsilon = attributes.real("epsilon");
    require(base_.kv_heads > 0 && base_.heads > 0 && base_.heads % base_.kv_heads == 0,
            "heads must be whole groups of KV heads");
    require(base_.heads <= kMost && base_.head_dim > 0 && base_.head_dim <= kMost, "heads and their size must fit 16 bits");
    require(base_.window >= 0 && layer_ >= 0, "window and layer must not be negative");
  }

  void compute(const Context& context, const Kernels& kernels) {
    Attention job = base_;
    const int64_t width = (job.heads + 2 * job.kv_heads) * job.head_dim;
    const auto qkv = context.dims(0), cache = context.dims(1), table = context.dims(4);
    require(table.size() == 2, "the block table must be (sequences, blocks)");
    require(qkv.size() == 2 && qkv[1] == width, "qkv must be (tokens, (heads + 2 KV heads) · head size)");
    require(cache.size() == 5 && layer_ < cache[1] && cache[2] == 2 && cache[3] >= job.kv_heads,
            "the KV cache has another shape");
    job.stored = stored(job, cache[4]);
    job.tokens = qkv[0];
    job.sequences = table[0];
    job.table_width = table[1];
    require(context.dims(2) == std::vector<int64_t>{job.sequences + 1}, "begins must be (sequences + 1)");
    require(context.dims(3) == std::vector<int64_t>{job.sequences}, "past must be (sequences)");
    require(context.dims(5) == std::vector<int64_t>{job.tokens}, "positions must be (tokens)");
    job.qkv = context.input<float>(0);
    job.cache_heads = cache[3];
    job.block_stride = cache[1] * 2 * job.cache_heads * cache[4];
    // Written in place: the caller binds its own memory, and no other operator reads this layer's part of it.
    job.cache = const_cast<uint8_t*>(context.input<uint8_t>(1)) + layer_ * (job.block_stride / cache[1]);
    job.begins = context.input<int32_t>(2);
    job.past = context.input<int32_t>(3);
    job.table = context.input<int32_t>(4);
    job.positions = context.input<int64_t>(5);
    job.cos = context.input<float>(6);
    job.sin = context.input<float>(7);
    job.q_norm = context.input<float>(8);
    job.k_norm = context.input<float>(9);
    check_companions(job, context);
    job.rotary_dim = job.cos ? 2 * context.dims(6)[1] : 0;
    require(job.begins[0] == 0 && job.begins[job.sequences] == job.tokens, "begins must cover all tokens");
    job.query = Scratch::of_this_thread().take<float>(job.tokens * job.heads * job.head_dim);
    job.y = context.output(job.tokens, job.heads * job.head_dim);

    std::vector<Tile> rows, tiles;
    for (int64_t s = 0; s < job.sequences; ++s) {
      check_table(job, s, cache[0]);
      for (int64_t token = job.begins[s]; token < job.begins[s + 1]; token += job.tile_tokens()) {
        rows.push_back({s, token, std::min(job.tile_tokens(), job.begins[s + 1] - token), 0});
      }
    }
    // The last tiles see the most keys: they begin first, so that no thread is left with a long one at the end.
    for (auto tile = rows.rbegin(); tile != rows.rend(); ++tile) {
      for (int64_t head = 0; head < job.kv_heads; ++head) {
        tiles.push_back({tile->sequence, tile->token, tile->count, head});
      }
    }
    const auto append = [&](int64_t i) {
      for (int64_t t = 0; t < rows[i].count; ++t) kernels.append(job, rows[i].sequence, rows[i].token + t);
    };
    if (job.tokens <= 2) {  // handing out so little costs more than doing it
      for (size_t i = 0; i < rows.size(); ++i) append(int64_t(i));
    } else {
      context.parallel(int64_t(rows.size()), append);
    }
    if (int64_t(tiles.size()) >= kManyTiles || !by_segments(job, tiles, context, kernels)) {
      by_tiles(job, tiles, context, kernels);
    }
  }

 private:
  // Enough to keep all threads busy to the end.
  static constexpr int64_t kManyTiles = 32;
  static constexpr int64_t kShareFloats = 1 << 20;  // held at once for the shares of all segments
  static constexpr int64_t kMost = 1 << 16;         // heads, and elements of one

  // What a cache with so many bytes for a head's keys in a block holds.
  static Stored stored(Attention job, int64_t head_bytes) {
    job.stored = Stored::kHalf;
    if (head_bytes == job.head_bytes()) return job.stored;
    job.stored = Stored::kCodes;
    require(head_bytes == job.head_bytes(), "the KV cache has another shape");
    return job.stored;
  }

  struct Segments {
    int64_t first, last;
  };
  static Segments segments(const Attention& job, const Tile& tile) {
    const int64_t position = job.position(tile.sequence, tile.token);
    return {job.lowest(position) / kSegment, (position + tile.count + kSegment - 1) / kSegment};
  }

  // A tile's segments one after another.
  static void by_tiles(const Attention& job, const std::vector<Tile>& tiles, const Context& context,
                       const Kernels& kernels) {
    context.parallel(int64_t(tiles.size()), [&](int64_t i) {
      const int64_t floats = tiles[i].count * job.group() * job.share_stride();
      thread_local std::vector<float> both;
      both.resize(2 * floats);
      float *total = both.data(), *share = total + floats;
      kernels.begin_share(job, tiles[i], total);
      for (auto [segment, last] = segments(job, tiles[i]); segment < last; ++segment) {
        kernels.attend(job, tiles[i], segment, share);
        kernels.join_share(job, tiles[i], total, share);
      }
      kernels.finish_share(job, tiles[i], total);
    });
  }

  // All segments of all tiles at once, for few tiles with many keys. False if their shares take too much memory.
  static bool by_segments(const Attention& job, const std::vector<Tile>& tiles, const Context& context,
                          const Kernels& kernels) {
    struct Part {
      size_t tile;
      int64_t segment, at;
    };
    std::vector<Part> parts;
    int64_t floats = 0;  // totals of all tiles lie before their shares
    for (const Tile& tile : tiles) floats += tile.count * job.group() * job.share_stride();
    for (size_t i = 0; i < tiles.size(); ++i) {
      for (auto [segment, last] = segments(job, tiles[i]); segment < last; ++segment) {
        parts.push_back({i, segment, floats});
        floats += tiles[i].count * job.group() * job.share_stride();
      }
    }
    if (floats > kShareFloats) return false;
    thread_local std::vector<float> shares;
    shares.resize(floats);
    float* const base = shares.data();
    context.parallel(int64_t(parts.size()), [&](int64_t i) {
      kernels.attend(job, tiles[parts[i].tile], parts[i].segment, base + parts[i].at);
    });
    float* total = base;
    auto part = parts.begin();
    for (size_t i = 0; i < tiles.size(); total += tiles[i].count * job.group() * job.share_stride(), ++i) {
      kernels.begin_share(job, tiles[i], total);
      for (; part != parts.end() && part->tile == i; ++part) {
        kernels.join_share(job, tiles[i], total, base + part->at);
      }
      kernels.finish_share(job, tiles[i], total);
    }
    return true;
  }

  // What may be absent has the size that is read of it; a graph need not be one of ours.
  static void check_companions(const Attention& job, const Context& context) {
    const std::vector<int64_t> head{job.head_dim};
    require(!job.q_norm || context.dims(8) == head, "the norm of queries must be (head size)");
    require(!job.k_norm || context.dims(9) == head, "the norm of keys must be (head size)");
    require(bool(job.q_norm) == bool(job.k_norm), "norms are of queries and keys, or of neither");
    require(bool(job.cos) == bool(job.sin), "cos comes with sin");
    if (!job.cos) return;
    const auto cos = context.dims(6);
    require(cos.size() == 2 && cos == context.dims(7) && cos[1] >= 0 && 2 * cos[1] <= job.head_dim,
            "cos and sin must be (positions, at most half the head size)");
    for (int64_t token = 0; token < job.tokens; ++token) {
      require(job.positions[token] >= 0 && job.positions[token] < cos[0], "a position is outside cos and sin");
    }
  }

  static void check_table(const Attention& job, int64_t sequence, int64_t blocks) {
    const int64_t count = job.begins[sequence + 1] - job.begins[sequence];
    const int64_t held = job.past[sequence] + count;
    require(count > 0 && job.past[sequence] >= 0, "a sequence without tokens");
    require(held <= job.table_width * kBlockTokens, "a sequence is longer than its row of the block table");
    for (int64_t i = 0; i * kBlockTokens < held; ++i) {
      const int32_t block = job.table[sequence * job.table_width + i];
      require(block >= 0 && block < blocks, "a block is outside the KV cache");
    }
  }

  Attention base_{};
  int64_t layer_;
};

}  // namespace edge
