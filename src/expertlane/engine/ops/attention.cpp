// Causal attention over a paged cache, of bfloat16 or float32.
//
// A sequence's rows (`attention_rows.h`) are cut into blocks. With few blocks, as in a decode, its
// positions are cut into equal stretches too, whose results are merged: how many depends on the
// length alone, so that a result does not depend on who computes it.

#include <omp.h>

#include <memory>

#include "attention_few.h"
#include "attention_tiles.h"

namespace {

constexpr int64_t kFewRows = 16;      // at most, of those multiplied where keys and values lie
constexpr int64_t kFewOfFloat8 = 4;   // widened again for every four, where pairs are faster
constexpr int64_t kBlockRows = 128;   // at most, of those that go through keys together
constexpr int64_t kFewBlocks = 4;     // at most, of a sequence whose positions are cut
constexpr int64_t kStretch = 256;     // positions that are not cut
constexpr int64_t kStretches = 64;    // at most

// A block of rows, whose `stretches` tasks' states are merged.
struct Block {
    Task all;
    int64_t stretches, length;  // length of each but the last

    Task stretch(Task part, int64_t i) const {
        part.first = all.first + i * length;
        part.end = std::min(all.end, part.first + length);
        return part;
    }
};

template <class T>
std::vector<Block> blocks_of(const Call<T>& call, int64_t seqs) {
    std::vector<Block> blocks;
    for (int64_t s = 0; s < seqs; ++s) {
        const int64_t rows = call.scheduled[s] * call.group;
        const int64_t count = (rows + kBlockRows - 1) / kBlockRows;
        for (int64_t row = 0; row < rows; row += kBlockRows) {
            Task task{s, row, std::min(kBlockRows, rows - row), 0, 0, 0, call.kv_heads};
            task.end = own_position(call, task, task.rows - 1) + 1;
            if (call.window > 0) {
                task.first = std::max<int64_t>(0, own_position(call, task, 0) + 1 - call.window);
            }
            const int64_t positions = task.end - task.first;
            Block block{task, 1, positions};
            if (count <= kFewBlocks && positions > kStretch) {
                const int64_t most = 2 * ((positions + 2 * kStretch - 1) / (2 * kStretch));
                block.length = round_up((positions - 1) / std::min(most, kStretches) + 1, kPanel);
                block.stretches = (positions - 1) / block.length + 1;
            }
            blocks.push_back(block);
        }
    }
    return blocks;
}

// Some stretches of a block for some kv heads: all of them, or one whose states go to `states`.
struct Piece {
    const Block* block;
    int64_t stretch, head, end_head;
    float* states;
};

template <class T>
bool is_few(const Call<T>& call, const Task& task) {
    return task.rows <= (kInPairs<T> && call.key_scales ? kFewOfFloat8 : kFewRows);
}

template <class T>
int64_t rows_of_states(const Call<T>& call, const Task& task) {
    return is_few(call, task) ? task.rows : round_up(task.rows, kPanel);
}

// A thread's room, and its work on pieces.
template <class T>
class Worker {
  public:
    explicit Worker(const Call<T>& call) : call_(call), size_(call.state_size()) {}

    void attend(const Piece& piece) {
        Task task = piece.block->all;
        task.head = piece.head, task.end_head = piece.end_head;
        if (piece.states) return attend(piece.block->stretch(task, piece.stretch), piece.states);
        const int64_t per_head = rows_of_states(call_, task) * size_;
        const int64_t num = (task.end_head - task.head) * per_head;
        if ((int64_t)states_.size() < 2 * num) states_.resize(2 * num);
        float *states = states_.data(), *others = states + num;
        for (int64_t i = 0; i < piece.block->stretches; ++i) {
            attend(piece.block->stretch(task, i), i ? others : states);
            for (int64_t at = 0; i && at < num; at += size_) merge(states + at, others + at, size_);
        }
        for (int64_t h = task.head; h < task.end_head; ++h, states += per_head) {
            for (int64_t r = 0; r < task.rows; ++r) finish(call_, task, h, r, states + r * size_);
        }
    }

  private:
    // States [heads, rows_of_states, size].
    void attend(const Task& task, float* states) {
        if (is_few(call_, task)) {
            return call_.key_scales ? attend_few(few_float8_, task, states)
                                    : attend_few(few_, task, states);
        }
        if (!tiles_) tiles_ = std::make_unique<TileRoom<T>>(call_, kBlockRows);
        for (int64_t h = task.head; h < task.end_head; ++h) {
            tiles_->attend(call_, task, h, states);
            states += rows_of_states(call_, task) * size_;
        }
    }

    template <class Room>
    void attend_few(std::unique_ptr<Room>& room, const Task& task, float* states) {
        if (!room) room = std::make_unique<Room>(call_, kFewRows);
        room->attend(call_, task, states);
    }

    const Call<T>& call_;
    int64_t size_;
    std::unique_ptr<FewRoom<T, T>> few_;
    std::unique_ptr<FewRoom<T, E4m3>> few_float8_;
    std::unique_ptr<TileRoom<T>> tiles_;
    std::vector<float> states_;
};

// What all threads do: pieces first, then blocks whose stretches were done apart.
struct Plan {
    std::vector<Block> blocks;
    std::vector<Piece> pieces;
    std::vector<const Block*> cut;
    std::vector<float*> states_of_cut;
    std::vector<float> states;
};

// A block that is much of the work is cut; kv heads are shared out where that is not enough.
template <class T>
Plan plan_of(const Call<T>& call, int64_t seqs) {
    const int64_t threads = omp_get_max_threads(), size = call.state_size();
    Plan plan;
    plan.blocks = blocks_of(call, seqs);
    int64_t total = 0, apart = 0, tasks = 0;
    for (const Block& block : plan.blocks) total += block.stretches;
    const auto is_cut = [&](const Block& block) {
        return block.stretches > 1 && block.stretches * 2 * threads > total;
    };
    for (const Block& block : plan.blocks) {
        tasks += is_cut(block) ? block.stretches : 1;
        if (is_cut(block)) apart += block.stretches * rows_of_states(call, block.all);
    }
    plan.states.resize(apart * call.kv_heads * size);
    float* states = plan.states.data();
    const int64_t wanted = tasks ? (4 * threads + tasks - 1) / tasks : 1;
    for (const Block& block : plan.blocks) {
        const bool is_many = !is_few(call, block.all);
        const int64_t parts = is_many ? call.kv_heads : std::min(call.kv_heads, wanted);
        const int64_t per_head = rows_of_states(call, block.all) * size;
        const int64_t stretches = is_cut(block) ? block.stretches : 1;
        if (is_cut(block)) plan.cut.push_back(&block), plan.states_of_cut.push_back(states);
        for (int64_t i = 0; i < stretches; ++i) {
            for (int64_t part = 0; part < parts; ++part) {
                const int64_t head = call.kv_heads * part / parts;
                const int64_t end = call.kv_heads * (part + 1) / parts;
                float* to = is_cut(block) ? states + head * per_head : nullptr;
                plan.pieces.push_back({&block, i, head, end, to});
            }
            if (is_cut(block)) states += call.kv_heads * per_head;
        }
    }
    return plan;
}

// Row r of a block for a kv head, whose stretches were done apart.
template <class T>
void merge_cut(const Call<T>& call, const Block& block, float* states, int64_t head, int64_t r) {
    const int64_t size = call.state_size(), rows = rows_of_states(call, block.all);
    float* own = states + (head * rows + r) * size;
    for (int64_t i = 1; i < block.stretches; ++i) {
        merge(own, own + i * call.kv_heads * rows * size, size);
    }
    finish(call, block.all, head, r, own);
}

// The new tokens' keys and values, and where they go.
template <class T>
struct NewTokens {
    const T* keys;
    int64_t key_stride;
    const T* values;
    int64_t value_stride;
    const int64_t* slots;
    int64_t count;
};

// Keys or values [blocks, kv_heads, block_size, dim]; if float8, with a scale for each row.
struct Store {
    void* rows;
    uint8_t* scales;  // null: of the type of queries
};

// A token's heads [kv_heads, dim] to where the cache has them.
template <class T>
void put_heads(const Call<T>& call, const T* from, int64_t slot, int64_t dim, const Store& cache) {
    const int64_t size = call.block_size, first = slot / size * call.kv_heads * size + slot % size;
    for (int64_t head = 0; head < call.kv_heads; ++head) {
        const int64_t row = first + head * size;
        const T* x = from + head * dim;
        if (cache.scales) {
            round_row(x, dim, (E4m3*)cache.rows + row * dim, cache.scales + row);
        } else {
            std::memcpy((T*)cache.rows + row * dim, x, (size_t)dim * sizeof(T));
        }
    }
}

template <class T>
void attend(const Call<T>& call, const NewTokens<T>& added, const Store& keys, const Store& values,
            int64_t seqs) {
    Plan plan = plan_of(call, seqs);
    const int64_t num_pieces = (int64_t)plan.pieces.size(), num_cut = (int64_t)plan.cut.size();
#pragma omp parallel
    {
        Worker<T> worker(call);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < added.count; ++i) {
            const int64_t slot = added.slots[i];
            put_heads(call, added.keys + i * added.key_stride, slot, call.key_dim, keys);
            if (!values.rows) continue;
            put_heads(call, added.values + i * added.value_stride, slot, call.value_dim, values);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < num_pieces; ++i) worker.attend(plan.pieces[i]);
        for (int64_t i = 0; i < num_cut; ++i) {
            const Block& block = *plan.cut[i];
            const int64_t rows = block.all.rows;
#pragma omp for schedule(static) nowait
            for (int64_t at = 0; at < call.kv_heads * rows; ++at) {
                merge_cut(call, block, plan.states_of_cut[i], at / rows, at % rows);
            }
        }
    }
}

template <class T>
void attend(const T* q, int64_t q_stride, const T* new_keys, int64_t new_key_stride,
            const T* new_values, int64_t new_value_stride, const int64_t* slots, int64_t tokens,
            const Store& keys, const Store& values, const int64_t* tables, int64_t width,
            const int64_t* first_token, const int64_t* scheduled, const int64_t* lengths,
            int64_t seqs, int64_t heads, int64_t kv_heads, int64_t key_dim, int64_t value_dim,
            int64_t block_size, float scale, int64_t window, const float* sinks, T* out) {
    const bool has_values = values.rows;
    const Store& of_values = has_values ? values : keys;
    const Call<T> call{q, q_stride, (const T*)keys.rows, (const T*)of_values.rows, tables, width,
                       first_token, scheduled, lengths, heads, heads / kv_heads, kv_heads, key_dim,
                       value_dim, block_size, has_values ? value_dim : key_dim, scale * kLog2E,
                       window, sinks, out, has_values, keys.scales, of_values.scales};
    attend(call, {new_keys, new_key_stride, new_values, new_value_stride, slots, tokens}, keys,
           values, seqs);
}

}  // namespace

extern "C" {

// Stores new tokens' keys and values; causal attention of each sequence's new tokens.
//
// q [tokens, heads, key_dim]; new_keys, new_values [tokens, kv_heads, dim], their places in the
// cache slots [tokens]; keys and values [blocks, kv_heads, block_size, dim], values null where they
// are the first value_dim of the keys. Of sequence s: block table tables[s], new tokens from
// first_token[s] on, scheduled[s] of them, the last at position lengths[s] - 1. Strides are those
// of tokens. Scales [blocks, kv_heads, block_size] of keys and values that are float8, or null. A
// window of 0 is none; sinks [heads] or null; out [tokens, heads, value_dim].
void attention(const bf16* q, int64_t q_stride, const bf16* new_keys, int64_t new_key_stride,
               const bf16* new_values, int64_t new_value_stride, const int64_t* slots,
               int64_t tokens, void* keys, void* values, uint8_t* key_scales,
               uint8_t* value_scales, const int64_t* tables, int64_t width,
               const int64_t* first_token, const int64_t* scheduled, const int64_t* lengths,
               int64_t seqs, int64_t heads, int64_t kv_heads, int64_t key_dim, int64_t value_dim,
               int64_t block_size, float scale, int64_t window, const float* sinks, bf16* out) {
    attend(q, q_stride, new_keys, new_key_stride, new_values, new_value_stride, slots, tokens,
           {keys, key_scales}, {values, value_scales}, tables, width, first_token, scheduled,
           lengths, seqs, heads, kv_heads, key_dim, value_dim, block_size, scale, window, sinks,
           out);
}

void attention_float(const float* q, int64_t q_stride, const float* new_keys,
                     int64_t new_key_stride, const float* new_values, int64_t new_value_stride,
                     const int64_t* slots, int64_t tokens, void* keys, void* values,
                     uint8_t* key_scales, uint8_t* value_scales, const int64_t* tables,
                     int64_t width, const int64_t* first_token, const int64_t* scheduled,
                     const int64_t* lengths, int64_t seqs, int64_t heads, int64_t kv_heads,
                     int64_t key_dim, int64_t value_dim, int64_t block_size, float scale,
                     int64_t window, const float* sinks, float* out) {
    attend(q, q_stride, new_keys, new_key_stride, new_values, new_value_stride, slots, tokens,
           {keys, key_scales}, {values, value_scales}, tables, width, first_token, scheduled,
           lengths, seqs, heads, kv_heads, key_dim, value_dim, block_size, scale, window, sinks,
           out);
}
}
