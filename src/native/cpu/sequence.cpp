#include "sequence.hpp"

#include "thread_pool.hpp"

#include <algorithm>
#include <deque>

namespace fewbit {
namespace {

constexpr std::size_t kPiecesPerThread = 8;

} // namespace

void multiply_in_turn(const std::vector<const Linear *> &linears, const Rows &x, const std::vector<float *> &y) {
    ThreadPool &threads = pool();
    std::vector<PreparedInput> prepared(linears.size());
    std::vector<std::size_t> features(linears.size());
    std::deque<Pieces> pieces; // they cannot be moved
    for (std::size_t i = 0; i < linears.size(); ++i) {
        const Linear &linear = *linears[i];
        const std::size_t tile = linear.tile();
        features[i] = std::max(tile, linear.out_features / (threads.threads() * kPiecesPerThread) / tile * tile);
        prepared[i].reshape(linear.input_format(x.rows), x.rows, x.columns, threads.threads());
        pieces.emplace_back((linear.out_features + features[i] - 1) / features[i]);
    }
    threads.run([&](std::size_t thread) {
        for (std::size_t i = 0; i < linears.size(); ++i) {
            const Linear &linear = *linears[i];
            prepared[i].fill(x, Norm{}, thread, threads.threads());
            threads.barrier(thread);
            for (std::size_t piece = pieces[i].take(); piece < pieces[i].count(); piece = pieces[i].take()) {
                const std::size_t begin = piece * features[i], end = std::min(begin + features[i], linear.out_features);
                linear.multiply(prepared[i].input(), y[i], linear.out_features, begin, end);
            }
        }
    });
}

} // namespace fewbit
