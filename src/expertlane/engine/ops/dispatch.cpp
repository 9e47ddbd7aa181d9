// What dispatch keeps its books with: copies chosen, rows by peer, pairs by expert; in one pass or
// two over the ids of a batch, where tensor operations take some twenty.
//
// A physical id names a slot of a rank, -1 nothing; "top_k" ids stand side by side in a row.

#include <cstdint>
#include <cstring>
#include <vector>

extern "C" {

// physical[pair] = the copy that a pair goes to: those of expert e stand in table [experts,
// most_copies], num_copies[e] of them, and take turns from number `first` on. -1 stays.
void choose_copies(const int64_t* experts, int64_t pairs, const int64_t* table,
                   int64_t most_copies, const int64_t* num_copies, int64_t num_experts,
                   int64_t first, int32_t* physical) {
    std::vector<int64_t> turn(num_experts, first);
    for (int64_t pair = 0; pair < pairs; ++pair) {
        const int64_t expert = experts[pair];
        if (expert < 0) {
            physical[pair] = -1;
            continue;
        }
        const int64_t copy = most_copies > 1 ? turn[expert]++ % num_copies[expert] : 0;
        physical[pair] = (int32_t)table[expert * most_copies + copy];
    }
}

// A row for each token and peer it reaches, by peer, then token. Of an id, id / divisor is the peer
// and id % divisor what the peer knows it by. counts [peers]; token [rows]; ids_there [rows, top_k],
// -1 for what is another peer's; place [tokens, peers], the row of a token for a peer or -1.
// With padding each peer has as many rows as there are tokens, and those behind its own no ids.
int64_t rows_by_peer(const int32_t* ids, int64_t stride, int64_t tokens, int64_t top_k,
                     int32_t divisor, int64_t peers, int32_t padded, int64_t* counts,
                     int64_t* token, int32_t* ids_there, int64_t* place) {
    std::memset(counts, 0, peers * sizeof(int64_t));
    std::memset(place, -1, tokens * peers * sizeof(int64_t));
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t k = 0; k < top_k; ++k) {
            if (ids[t * stride + k] < 0) continue;
            int64_t& row = place[t * peers + ids[t * stride + k] / divisor];
            if (row < 0) row = counts[ids[t * stride + k] / divisor]++;
        }
    }
    std::vector<int64_t> begin(peers);
    int64_t rows = 0;
    for (int64_t p = 0; p < peers; ++p) begin[p] = rows, rows += padded ? tokens : counts[p];
    std::memset(ids_there, -1, rows * top_k * sizeof(int32_t));
    if (padded) std::memset(token, 0, rows * sizeof(int64_t));
    for (int64_t t = 0; t < tokens; ++t) {
        int64_t* rows_of = place + t * peers;
        for (int64_t p = 0; p < peers; ++p) {
            if (rows_of[p] >= 0) rows_of[p] += begin[p], token[rows_of[p]] = t;
        }
        for (int64_t k = 0; k < top_k; ++k) {
            const int32_t id = ids[t * stride + k];
            if (id >= 0) ids_there[rows_of[id / divisor] * top_k + k] = id % divisor;
        }
    }
    return rows;
}

// Rows and pairs of copies' ids for the peers: as of rows_by_peer; counts [2, peers] of rows and of
// pairs; place [tokens, top_k], where each pair stands among all by peer, stable; -1 for none.
static int64_t outgoing_of_ids(const int32_t* ids, int64_t tokens, int64_t top_k, int32_t divisor, int64_t peers,
                int64_t* counts, int64_t* token, int32_t* ids_there, int64_t* place) {
    std::vector<int64_t> row_places(tokens * peers), next(peers + 1);
    const int64_t rows = rows_by_peer(ids, top_k, tokens, top_k, divisor, peers, 0, counts, token,
                                      ids_there, row_places.data());
    int64_t* pairs = counts + peers;
    std::memset(pairs, 0, peers * sizeof(int64_t));
    for (int64_t p = 0; p < tokens * top_k; ++p) {
        if (ids[p] >= 0) ++pairs[ids[p] / divisor];
    }
    for (int64_t p = 0; p < peers; ++p) next[p + 1] = next[p] + pairs[p];
    for (int64_t p = 0; p < tokens * top_k; ++p) {
        place[p] = ids[p] < 0 ? -1 : next[ids[p] / divisor]++;
    }
    return rows;
}

// The same of logical experts, with their copies' ids as of choose_copies.
int64_t outgoing(const int64_t* experts, int64_t tokens, int64_t top_k, const int64_t* table,
                 int64_t most_copies, const int64_t* num_copies, int64_t num_experts, int64_t first,
                 int32_t divisor, int64_t peers, int32_t* ids, int64_t* counts, int64_t* token,
                 int32_t* ids_there, int64_t* place) {
    choose_copies(experts, tokens * top_k, table, most_copies, num_copies, num_experts, first, ids);
    return outgoing_of_ids(ids, tokens, top_k, divisor, peers, counts, token, ids_there, place);
}

// Pairs in the order of their groups, stable: group g has the ids from first + g * divisor on,
// others belong to no pair. Pairs are numbered by row, then choice; with room for rows * top_k, ids
// without a pair are numbered too. counts and ends [groups]; row and number [room], in the order of
// groups, and behind the pairs what belongs to none; without room (-1) [pairs]; numbers
// [rows, top_k], -1 where there is no pair. Returns how many pairs there are.
int64_t group_pairs(const int32_t* ids, int64_t stride, int64_t rows, int64_t top_k, int32_t first,
                    int32_t divisor, int64_t groups, int64_t room, int64_t* counts, int64_t* ends,
                    int64_t* row, int64_t* number, int64_t* numbers) {
    std::memset(counts, 0, groups * sizeof(int64_t));
    const auto group_of = [=](int64_t r, int64_t k) -> int64_t {
        const int32_t id = ids[r * stride + k] - first;
        if (id < 0) return -1;
        const int64_t group = id / divisor;
        return group < groups ? group : -1;
    };
    const bool all = room == rows * top_k;
    int64_t pairs = 0;
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t k = 0; k < top_k; ++k) {
            const int64_t group = group_of(r, k), pair = r * top_k + k;
            numbers[pair] = group < 0 ? -1 : all ? pair : pairs;
            if (group >= 0) ++counts[group], ++pairs;
        }
    }
    for (int64_t g = 0, begin = 0; g < groups; ++g) ends[g] = begin, begin += counts[g];
    int64_t none = pairs;  // where the next without a pair goes
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t k = 0; k < top_k; ++k) {
            const int64_t pair = r * top_k + k;
            if (numbers[pair] >= 0) {
                const int64_t at = ends[group_of(r, k)]++;  // so they become ends
                row[at] = r;
                number[at] = numbers[pair];
            } else if (none < room) {
                row[none] = r;
                number[none] = all ? pair : none;
                ++none;
            }
        }
    }
    return pairs;
}

// How far tokens spread: id / divisor is a rank, nodes [ranks] the node of each. num_ranks,
// num_nodes [tokens]: how many of either hold some id of a token; remote [2]: of all tokens, how many
// of those ranks, and of those nodes, are not of `node`.
void fan_out(const int32_t* ids, int64_t tokens, int64_t top_k, int32_t divisor, int64_t ranks,
             const int64_t* nodes, int64_t node, int64_t* num_ranks, int64_t* num_nodes,
             int64_t* remote) {
    std::vector<int64_t> rank_seen(ranks, -1), node_seen(ranks, -1);  // by the latest token
    remote[0] = remote[1] = 0;
    for (int64_t t = 0; t < tokens; ++t) {
        num_ranks[t] = num_nodes[t] = 0;
        for (int64_t k = 0; k < top_k; ++k) {
            const int64_t rank = ids[t * top_k + k] / divisor;
            if (rank_seen[rank] == t) continue;
            rank_seen[rank] = t;
            ++num_ranks[t];
            remote[0] += nodes[rank] != node;
            if (node_seen[nodes[rank]] == t) continue;
            node_seen[nodes[rank]] = t;
            ++num_nodes[t];
            remote[1] += nodes[rank] != node;
        }
    }
}

// Rows of bytes put together of pieces: piece i takes bytes [i] of row index[i][r] (or r, where
// index[i] is null) of from [i], whose rows are stride [i] apart, to every row r of `to`.
void pack_rows(char* to, int64_t rows, int64_t row_bytes, int64_t pieces, const char* const* from,
               const int64_t* stride, const int64_t* bytes, const int64_t* const* index) {
    for (int64_t r = 0; r < rows; ++r, to += row_bytes) {
        char* at = to;
        for (int64_t i = 0; i < pieces; ++i) {
            std::memcpy(at, from[i] + (index[i] ? index[i][r] : r) * stride[i], bytes[i]);
            at += bytes[i];
        }
    }
}
}
