#include "sequence.hpp"

#include "thread_pool.hpp"

#include <deque>

namespace fewbit {

void multiply_in_turn(const std::vector<const Linear *> &linears, const Rows &x, const std::vector<float *> &y) {
    ThreadPool &threads = pool();
    std::vector<PreparedInput> prepared(linears.size());
    std::deque<Ranges> ranges; // they cannot be moved
    for (std::size_t i = 0; i < linears.size(); ++i) {
        const Linear &linear = *linears[i];
        prepared[i].reshape(linear.input_format(x.rows), x.rows, x.columns, threads.threads());
        ranges.emplace_back(linear.out_features, linear.tile(), threads.threads());
    }
    threads.run([&](std::size_t thread) {
        for (std::size_t i = 0; i < linears.size(); ++i) {
            const Linear &linear = *linears[i];
            prepared[i].fill(x, Norm{}, thread, threads.threads());
            threads.barrier(thread);
            for (std::size_t begin = 0, end = 0; ranges[i].take(begin, end);) {
                linear.multiply(prepared[i].input(), y[i], linear.out_features, begin, end);
            }
        }
    });
}

} // namespace fewbit
