// The routed experts of a layer, and the shared one, in one call.
//
// Tokens are grouped by expert; first every expert's gate and up with the activation, then for a few columns of the hidden
// at a time the down projections of all experts. A token adds up its experts in the order of their numbers, the shared one
// last, in float32: an order that no other token has a say in.
#include "api.h"
#include "matrix.h"

namespace srt {

namespace {

constexpr int kTokensAtOnce = 2048;  // bounds the scratch, and the sums of a task fit the second-level cache
constexpr int kRowsOfTask = 48;

struct Expert {
    Matrix gate_up, down;
    int width;         // activations of a token
    float limit;       // infinite: none
    int begin, end;    // its rows among the sorted assignments
};

struct GateTask {
    int expert, begin, end, first_panel, last_panel;
};

struct Layout {
    int hidden, hidden_words, stride;  // stride: elements of an activation row
};

// A panel of packed gate and up has sixteen columns of each, so that one tile holds both halves of its activations.
template <class T>
void gate_task(const GateTask& task, const Expert& expert, Rows x, const int32_t* tokens, Layout layout, T* acts) {
    thread_local Scratch scratch;
    const int rows = task.end - task.begin, words = layout.hidden_words;
    Rows from{x.data + tokens[task.begin] * x.stride, x.stride};
    if (tokens[task.end - 1] - tokens[task.begin] != rows - 1) {  // ascending, so this says: not side by side
        auto* copy = scratch.reserve<uint32_t>(static_cast<size_t>(rows) * words);
        for (int r = 0; r < rows; ++r)
            std::memcpy(copy + static_cast<int64_t>(r) * words, x.data + tokens[task.begin + r] * x.stride, sizeof(uint32_t) * words);
        from = Rows{copy, words};
    }
    for (int panel = task.first_panel; panel < task.last_panel; ++panel) {
        rows_times<T>(from, 0, rows, expert.gate_up, panel, [&](int first, int height, const float* sums) {
            T* to = acts + static_cast<int64_t>(task.begin + first) * layout.stride + panel * kLanes;
            for (int r = 0; r < height; ++r, to += layout.stride, sums += kPanel)
                vstore(to, vgated(vload(sums), vload(sums + kLanes), expert.limit));
        });
    }
}

// Columns [first, last) panels of the hidden, all experts, all tokens.
template <class T>
void down_task(int first_panel, int last_panel, const Expert* experts, int count, const T* acts, const int32_t* tokens,
               const float* weights, int n, Layout layout, T* out) {
    thread_local Scratch scratch;
    const int wide = (last_panel - first_panel) * kPanel;
    float* total = scratch.reserve<float>(static_cast<size_t>(n) * wide);
    std::memset(total, 0, sizeof(float) * static_cast<size_t>(n) * wide);
    const Rows rows{reinterpret_cast<const uint32_t*>(acts), layout.stride / Word<T>::elements};
    for (int e = 0; e < count; ++e) {
        const Expert& expert = experts[e];
        if (expert.begin == expert.end) continue;
        for (int panel = first_panel; panel < last_panel; ++panel) {
            rows_times<T>(rows, expert.begin, expert.end, expert.down, panel, [&](int first, int height, const float* sums) {
                for (int r = first; r < first + height; ++r, sums += kPanel) {
                    float* to = total + static_cast<int64_t>(tokens[r]) * wide + (panel - first_panel) * kPanel;
                    const vf share = vset(weights[r]);
                    vstore(to, vfma(share, vload(sums), vload(to)));
                    vstore(to + kLanes, vfma(share, vload(sums + kLanes), vload(to + kLanes)));
                }
            });
        }
    }
    const int begin = first_panel * kPanel, columns = at_most(wide, layout.hidden - begin);
    for (int t = 0; t < n; ++t)
        for (int i = 0; i < columns; i += kLanes)
            vstore_n(out + static_cast<int64_t>(t) * layout.hidden + begin + i, vload(total + static_cast<int64_t>(t) * wide + i),
                     columns - i);
}

struct Assignments {
    int32_t* tokens;  // sorted by expert, then by token; the shared expert's are all tokens
    float* weights;
};

// Returns how many there are; an id of `count` or more stands for an expert elsewhere.
int sort_by_expert(const int32_t* ids, const float* weights, int n, int chosen, Expert* experts, int count, Assignments to) {
    for (int i = 0; i < n * chosen; ++i)
        if (ids[i] < count) ++experts[ids[i]].end;
    int next = 0;
    for (int e = 0; e < count; ++e) {
        const int rows = experts[e].end;
        experts[e].begin = experts[e].end = next;
        next += rows;
    }
    for (int i = 0; i < n * chosen; ++i) {
        if (ids[i] >= count) continue;
        const int at = experts[ids[i]].end++;
        to.tokens[at] = i / chosen, to.weights[at] = weights[i];
    }
    return next;
}

int list_gate_tasks(const Expert* experts, int count, GateTask* list) {
    int tasks = 0;
    for (int e = count - 1; e >= 0; --e) {
        const int panels = blocks_of(experts[e].width, kLanes);
        // Few rows: the weights take the time, so cut them; many rows: cut the rows.
        const int per_task = experts[e].end - experts[e].begin <= kTileRows ? 4 : panels;
        for (int begin = experts[e].begin; begin < experts[e].end; begin += kRowsOfTask)
            for (int panel = 0; panel < panels; panel += per_task)
                list[tasks++] = GateTask{e, begin, at_most(begin + kRowsOfTask, experts[e].end), panel, at_most(panel + per_task, panels)};
    }
    return tasks;
}

struct MoeCall {
    int32_t dtype, hidden, experts, chosen, width;
    float limit;
    Matrix gate_up, down;  // the first expert's; the others follow panel on panel
    int32_t shared_width;  // 0: no shared expert
    float shared_limit;
    const uint8_t *shared_gate_up, *shared_down;  // plain
};

template <class T>
void run(const MoeCall& c, Rows x, const int32_t* ids, const float* weights, int n, T* out) {
    thread_local Scratch expert_scratch, task_scratch, token_scratch, weight_scratch, act_scratch;
    const Layout layout{c.hidden, words_of<T>(c.hidden), blocks_of(at_least(c.width, c.shared_width), kLanes) * kLanes};
    const int count = c.experts + (c.shared_width > 0), most_rows = n * c.chosen + (c.shared_width > 0 ? n : 0);
    const int hidden_panels = blocks_of(c.hidden, kPanel), gate_panels = blocks_of(c.width, kLanes);
    Expert* experts = expert_scratch.reserve<Expert>(static_cast<size_t>(count));
    for (int64_t e = 0; e < c.experts; ++e)
        experts[e] = Expert{c.gate_up.after<T>(e * gate_panels), c.down.after<T>(e * hidden_panels), c.width, c.limit, 0, 0};
    const Assignments sorted{token_scratch.reserve<int32_t>(static_cast<size_t>(most_rows)),
                             weight_scratch.reserve<float>(static_cast<size_t>(most_rows))};
    int rows = sort_by_expert(ids, weights, n, c.chosen, experts, c.experts, sorted);
    if (c.shared_width > 0) {
        const Matrix gate_up{kPlain, c.hidden, c.shared_gate_up, nullptr, nullptr};
        const Matrix down{kPlain, c.shared_width, c.shared_down, nullptr, nullptr};
        experts[c.experts] = Expert{gate_up, down, c.shared_width, c.shared_limit, rows, rows + n};
        for (int t = 0; t < n; ++t, ++rows) sorted.tokens[rows] = t, sorted.weights[rows] = 1.0f;
    }
    const int most_tasks = (rows / kRowsOfTask + count) * blocks_of(layout.stride, kLanes);
    GateTask* list = task_scratch.reserve<GateTask>(static_cast<size_t>(most_tasks));
    const int gate_count = list_gate_tasks(experts, count, list);
    T* acts = act_scratch.reserve<T>(static_cast<size_t>(rows) * layout.stride);
    const int threads = thread_count(), per_task = hidden_panels >= 4 * threads ? 2 : 1;
    each(gate_count, threads, [&](int i) { gate_task(list[i], experts[list[i].expert], x, sorted.tokens, layout, acts); });
    each(blocks_of(hidden_panels, per_task), threads, [&](int i) {
        const int first = i * per_task, last = at_most(first + per_task, hidden_panels);
        down_task(first, last, experts, count, acts, sorted.tokens, sorted.weights, n, layout, out);
    });
}

}  // namespace

}  // namespace srt

using namespace srt;

// x [n, hidden], ids and weights [n, chosen], out [n, hidden].
SRT_API void srt_moe(const MoeCall* c, const void* x, int64_t stride, const int32_t* ids, const float* weights, int n, void* out) {
    with_type(c->dtype, x, [&](auto* from) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(from)>>;
        thread_local Scratch scratch;
        const Rows rows = words_in(from, stride, n, c->hidden, scratch);
        for (int begin = 0; begin < n; begin += kTokensAtOnce)
            run<T>(*c, Rows{rows.data + begin * rows.stride, rows.stride}, ids + static_cast<int64_t>(begin) * c->chosen,
                   weights + static_cast<int64_t>(begin) * c->chosen, at_most(kTokensAtOnce, n - begin),
                   same_type(from, out) + static_cast<int64_t>(begin) * c->hidden);
    });
}
