// Pairs of a step shared among copies so that the fullest rank has least, as balance/copies.py
// defines it: the same whole numbers in the same order, so the same copy for every pair.

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

using Whole = int64_t;
using Wholes = std::vector<Whole>;

struct Place {
    Whole expert, copy;  // of those with several copies
};

struct Step {
    Whole from = -1;
    Place place = {0, 0};
    Whole to = 0;  // copy
};

// Pairs on their way from ranks with too many to ranks with too few.
struct Flow {
    Whole copies;           // most of an expert
    const Wholes& holders;  // [experts, copies]
    const Wholes& num_held;
    Wholes& loads;  // [ep]
    Wholes& pairs;  // [experts, copies]
    std::vector<std::vector<Place>> of_rank = std::vector<std::vector<Place>>(loads.size());
    std::vector<Step> came = std::vector<Step>(loads.size());
    std::vector<char> is_reached = std::vector<char>(loads.size());
    Wholes queue = {};
    Whole num_paths = 0;

    Whole run(Whole most_paths) {
        Whole sum = 0;
        for (Whole e = 0; e < (Whole)num_held.size(); ++e) {
            for (Whole c = 0; c < num_held[e]; ++c) {
                of_rank[holders[e * copies + c]].push_back({e, c});
            }
        }
        for (const Whole load : loads) sum += load;
        Whole target = mean_up(sum, loads.size());
        while (*std::max_element(loads.begin(), loads.end()) > target && num_paths < most_paths) {
            const Whole end = search(target);
            if (end < 0) {
                sum = 0;
                for (const Whole rank : queue) sum += loads[rank];
                target = mean_up(sum, queue.size());
            } else {
                push(end, target);
                ++num_paths;
            }
        }
        return target;
    }

    static Whole mean_up(Whole sum, size_t num) { return (sum + (Whole)num - 1) / (Whole)num; }

    // The first rank reached with fewer pairs than the target, or -1; `queue` has all reached.
    Whole search(Whole target) {
        queue.clear();
        std::fill(is_reached.begin(), is_reached.end(), 0);
        for (Whole rank = 0; rank < (Whole)loads.size(); ++rank) {
            if (loads[rank] > target) queue.push_back(rank), is_reached[rank] = 1, came[rank] = {};
        }
        for (size_t i = 0; i < queue.size(); ++i) {
            const Whole rank = queue[i];
            for (const Place place : of_rank[rank]) {
                const Whole first = place.expert * copies;
                if (!pairs[first + place.copy]) continue;
                for (Whole to = 0; to < num_held[place.expert]; ++to) {
                    const Whole other = holders[first + to];
                    if (is_reached[other]) continue;
                    is_reached[other] = 1;
                    came[other] = {rank, place, to};
                    if (loads[other] < target) return other;
                    queue.push_back(other);
                }
            }
        }
        return -1;
    }

    void push(Whole end, Whole target) {
        Whole rank = end, amount = target - loads[end];
        for (; came[rank].from >= 0; rank = came[rank].from) {
            const Place place = came[rank].place;
            amount = std::min(amount, pairs[place.expert * copies + place.copy]);
        }
        amount = std::min(amount, loads[rank] - target);
        loads[rank] -= amount;
        loads[end] += amount;
        for (rank = end; came[rank].from >= 0; rank = came[rank].from) {
            const Whole first = came[rank].place.expert * copies;
            pairs[first + came[rank].place.copy] -= amount;
            pairs[first + came[rank].to] += amount;
        }
    }
};

// The pairs `count` of rank r for each copy as choose_copies has them, which take turns.
void take_turns(Whole count, Whole r, const Whole* ep_ranks, Whole num, const Whole* distance,
                Whole* quota) {
    Whole nearest = distance[ep_ranks[0]], usable = 0, at = 0;
    for (Whole c = 1; c < num; ++c) nearest = std::min(nearest, distance[ep_ranks[c]]);
    for (Whole c = 0; c < num; ++c) usable += distance[ep_ranks[c]] == nearest;
    for (Whole c = 0; c < num; ++c) {
        if (distance[ep_ranks[c]] != nearest) continue;
        const Whole turn = ((at++ - r) % usable + usable) % usable;
        quota[c] = (count + usable - 1 - turn) / usable;
    }
}

// Pairs of an expert from copy `give` to copy `take`, first of ranks whose way gets no longer.
// quota [ranks, stride]; distance [ranks, ep].
void hand_over(Whole amount, Whole give, Whole take, const Whole* ep_ranks, const Whole* distance,
               Whole ranks, Whole ep, Whole* quota, Whole stride) {
    for (Whole extra = 0; extra < 3; ++extra) {
        for (Whole r = 0; r < ranks && amount; ++r) {
            const Whole* of_rank = distance + r * ep;
            if (of_rank[ep_ranks[take]] - of_rank[ep_ranks[give]] != extra) continue;
            const Whole moved = std::min(amount, quota[r * stride + give]);
            quota[r * stride + give] -= moved;
            quota[r * stride + take] += moved;
            amount -= moved;
        }
    }
}

}  // namespace

extern "C" {

// physical [pairs] = slots of the copies that pairs go to, of all ranks' tokens: `owned` [ranks] of
// them, rank after rank, top_k experts each. holders, slots [experts, copies]: the ep rank and the
// physical id of each copy, num_held [experts] of them; distance [ranks, ep]: 0 own, 1 near, 2 far.
// told [4]: pairs of the fullest rank before and after, what no sharing gets under, paths.
void balance_copies(const int32_t* experts, const Whole* owned, Whole ranks, Whole top_k,
                    Whole num_experts, Whole ep, Whole copies, const Whole* holders,
                    const Whole* num_held, const Whole* distance, const Whole* slots,
                    Whole paths_of_rank, int32_t* physical, Whole* told) {
    Wholes held, num, place(num_experts, -1);  // of experts with several copies
    for (Whole e = 0; e < num_experts; ++e) {
        if (num_held[e] == 1) continue;
        place[e] = num.size(), num.push_back(num_held[e]);
        held.insert(held.end(), holders + e * copies, holders + (e + 1) * copies);
    }
    const Whole shared = num.size(), stride = shared * copies;
    Wholes loads(ep), counts(ranks * shared), quotas(ranks * stride), pairs(stride);
    const int32_t* id = experts;
    for (Whole r = 0; r < ranks; ++r) {
        for (const int32_t* end = id + owned[r] * top_k; id < end; ++id) {
            const Whole m = place[*id];
            ++(m < 0 ? loads[holders[*id * copies]] : counts[r * shared + m]);
        }
        for (Whole m = 0; m < shared; ++m) {
            Whole* quota = &quotas[r * stride + m * copies];
            const Whole *ep_ranks = &held[m * copies], count = counts[r * shared + m];
            take_turns(count, r, ep_ranks, num[m], distance + r * ep, quota);
            for (Whole c = 0; c < num[m]; ++c) {
                pairs[m * copies + c] += quota[c];
                loads[ep_ranks[c]] += quota[c];
            }
        }
    }
    told[0] = *std::max_element(loads.begin(), loads.end());
    const Wholes before = pairs;
    Flow flow{copies, held, num, loads, pairs};
    told[2] = flow.run(paths_of_rank * ep);
    told[1] = *std::max_element(loads.begin(), loads.end());
    told[3] = flow.num_paths;
    for (Whole m = 0; m < shared; ++m) {
        Wholes change(num[m]);
        for (Whole c = 0; c < num[m]; ++c) change[c] = pairs[m * copies + c] - before[m * copies + c];
        for (Whole give = 0; give < num[m]; ++give) {
            for (Whole take = 0; take < num[m]; ++take) {
                if (change[give] >= 0 || change[take] <= 0) continue;
                const Whole amount = std::min(-change[give], change[take]);
                change[give] += amount, change[take] -= amount;
                hand_over(amount, give, take, &held[m * copies], distance, ranks, ep,
                          &quotas[m * copies], stride);
            }
        }
    }
    id = experts;
    for (Whole r = 0; r < ranks; ++r) {
        Wholes copy(shared);
        for (const int32_t* end = id + owned[r] * top_k; id < end; ++id) {
            const Whole m = place[*id];
            Whole at = 0;
            if (m >= 0) {
                Whole* quota = &quotas[r * stride + m * copies];
                while (!quota[copy[m]]) ++copy[m];
                --quota[at = copy[m]];
            }
            *physical++ = (int32_t)slots[*id * copies + at];
        }
    }
}

// Of the tokens of each rank, `owned` [ranks], rank after rank: counts [ranks, 2, peers], rows for
// the peers id / divisor, a token's one for each that it reaches, and pairs.
void rows_and_pairs(const int32_t* ids, const Whole* owned, Whole ranks, Whole top_k,
                    int32_t divisor, Whole peers, Whole* counts) {
    std::fill_n(counts, ranks * 2 * peers, 0);
    Wholes latest(peers, -1);  // token
    Whole token = 0;
    for (Whole r = 0; r < ranks; ++r, counts += 2 * peers) {
        for (Whole t = 0; t < owned[r]; ++t, ++token) {
            for (Whole k = 0; k < top_k; ++k) {
                const Whole peer = *ids++ / divisor;
                counts[peer] += latest[peer] != token;
                latest[peer] = token;
                ++counts[peers + peer];
            }
        }
    }
}
}
