// Time of each kernel that a call launches, without a profiler: the call is captured as a graph,
// an event is recorded between each two of its nodes, and the graph is launched repeatedly. Kernels
// that overlap in the call itself do not overlap here.
#include <cxxabi.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <stdexcept>

#include "device.h"

namespace nsa::bench {

namespace {

// Edges carry data, for kernels that start before the one before has ended. The functions that know
// it got the plain names with CUDA 13.
#if CUDART_VERSION >= 13000
constexpr auto get_edges = cudaGraphGetEdges;
constexpr auto add_dependencies = cudaGraphAddDependencies;
constexpr auto remove_dependencies = cudaGraphRemoveDependencies;
#else
constexpr auto get_edges = cudaGraphGetEdges_v2;
constexpr auto add_dependencies = cudaGraphAddDependencies_v2;
constexpr auto remove_dependencies = cudaGraphRemoveDependencies_v2;
#endif

/// "void a::b::name<...>(...)" -> "name".
std::string short_name(const char* mangled) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> full(
      abi::__cxa_demangle(mangled, nullptr, nullptr, &status), std::free);
  std::string name = status == 0 && full ? full.get() : mangled;
  // Parts of names in anonymous namespaces hold brackets themselves.
  for (const char* anonymous : {"(anonymous namespace)::", "::(anonymous namespace)"})
    for (size_t at; (at = name.find(anonymous)) != std::string::npos;)
      name.erase(at, std::string(anonymous).size());
  name = name.substr(0, name.find_first_of("<("));
  return name.substr(name.find_last_of(": ") + 1);
}

std::string node_name(cudaGraphNode_t node) {
  cudaGraphNodeType type;
  NSA_BENCH_CHECK(cudaGraphNodeGetType(node, &type));
  if (type == cudaGraphNodeTypeMemset) return "memset";
  if (type == cudaGraphNodeTypeMemcpy) return "memcpy";
  if (type != cudaGraphNodeTypeKernel) return "other";
  cudaKernelNodeParams params{};
  NSA_BENCH_CHECK(cudaGraphKernelNodeGetParams(node, &params));
  const char* name = nullptr;
  if (cudaFuncGetName(&name, params.func) != cudaSuccess || name == nullptr) {
    cudaGetLastError();
    return "kernel";
  }
  return short_name(name);
}

struct Edge {
  cudaGraphNode_t from, to;
  cudaGraphEdgeData data;
};

std::vector<Edge> edges_of(cudaGraph_t graph) {
  size_t count = 0;
  NSA_BENCH_CHECK(get_edges(graph, nullptr, nullptr, nullptr, &count));
  std::vector<cudaGraphNode_t> from(count), to(count);
  std::vector<cudaGraphEdgeData> data(count);
  if (count > 0) NSA_BENCH_CHECK(get_edges(graph, from.data(), to.data(), data.data(), &count));
  std::vector<Edge> edges;
  for (size_t i = 0; i < count; ++i) edges.push_back({from[i], to[i], data[i]});
  return edges;
}

/// The nodes of a graph that one stream captured, which is a chain.
std::vector<cudaGraphNode_t> chain_of(cudaGraph_t graph, const std::vector<Edge>& edges) {
  std::map<cudaGraphNode_t, cudaGraphNode_t> next;
  for (const Edge& edge : edges)
    if (!next.emplace(edge.from, edge.to).second)
      throw std::runtime_error("the kernels of a call do not form a chain");
  size_t roots = 0;
  NSA_BENCH_CHECK(cudaGraphGetRootNodes(graph, nullptr, &roots));
  if (roots != 1) throw std::runtime_error("the kernels of a call do not form a chain");
  cudaGraphNode_t node;
  NSA_BENCH_CHECK(cudaGraphGetRootNodes(graph, &node, &roots));
  std::vector<cudaGraphNode_t> chain{node};
  for (auto found = next.find(node); found != next.end(); found = next.find(found->second))
    chain.push_back(found->second);
  return chain;
}

cudaGraph_t capture(const Launch& launch, cudaStream_t stream) {
  cudaGraph_t graph = nullptr;
  NSA_BENCH_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  try {
    launch(stream);
  } catch (...) {
    cudaStreamEndCapture(stream, &graph);  // the stream goes on being used
    throw;
  }
  NSA_BENCH_CHECK(cudaStreamEndCapture(stream, &graph));
  return graph;
}

}  // namespace

std::vector<Timer::Part> Timer::time_parts(const Launch& launch, const Effort& effort) {
  NSA_BENCH_CHECK(cudaDeviceSynchronize());
  const cudaGraph_t graph = capture(launch, stream_);
  const std::vector<Edge> edges = edges_of(graph);
  const std::vector<cudaGraphNode_t> chain = chain_of(graph, edges);
  for (const Edge& edge : edges)
    NSA_BENCH_CHECK(remove_dependencies(graph, &edge.from, &edge.to, &edge.data, 1));
  std::vector<cudaEvent_t> events(chain.size() + 1);
  for (size_t i = 0; i < events.size(); ++i) {
    NSA_BENCH_CHECK(cudaEventCreate(&events[i]));
    cudaGraphNode_t record;
    NSA_BENCH_CHECK(cudaGraphAddEventRecordNode(&record, graph, i ? &chain[i - 1] : nullptr,
                                                i ? 1 : 0, events[i]));
    if (i < chain.size()) NSA_BENCH_CHECK(add_dependencies(graph, &record, &chain[i], nullptr, 1));
  }
  cudaGraphExec_t executable;
  NSA_BENCH_CHECK(cudaGraphInstantiate(&executable, graph, 0));

  std::vector<std::vector<double>> times(chain.size());
  for (int64_t repeat = -effort.warmup; repeat < effort.repeats; ++repeat) {
    NSA_BENCH_CHECK(cudaGraphLaunch(executable, stream_));
    NSA_BENCH_CHECK(cudaStreamSynchronize(stream_));
    for (size_t i = 0; i < chain.size() && repeat >= 0; ++i) {
      float ms;
      NSA_BENCH_CHECK(cudaEventElapsedTime(&ms, events[i], events[i + 1]));
      times[i].push_back(ms);
    }
  }

  std::vector<Part> parts;
  std::map<std::string, int> seen;
  for (size_t i = 0; i < chain.size(); ++i) {
    std::string name = node_name(chain[i]);
    const int count = ++seen[name];
    if (count > 1) name += " " + std::to_string(count);
    parts.push_back({name, spread_of(times[i])});
  }
  NSA_BENCH_CHECK(cudaGraphExecDestroy(executable));
  NSA_BENCH_CHECK(cudaGraphDestroy(graph));
  for (cudaEvent_t event : events) NSA_BENCH_CHECK(cudaEventDestroy(event));
  return parts;
}

}  // namespace nsa::bench
