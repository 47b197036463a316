"""The helper module of the FedSSG course, in the order in which data flow; a module imports only from those above it.

Read the modules with a * first: they are the whole method. The others read data, protect, attack, remember and draw.

errors      one-line range checks with clear words
keys *      every random act by (seed, purpose, client, round)
metrics *   scores from summed confusion matrices, intervals over seeds         lessons 04, 05
devices *   simulated imaging devices                                           01
files       where data and results lie; archives, tables, images beyond memory  all
folder      a folder of pictures, prepared once                                 01
data        image sets: phantom, MedMNIST, HAM10000, your own                   01
partition * split by lesion, hospitals                                          01
models *    SmallCNN as one flat vector; how images enter it                    04
generator * the class-conditional VAE and its closed form                       02
protection  what a hospital can do against leaks before it uploads              06
dpsgd       a generator with differential privacy                               06
dpmeans     the same in closed form: noisy means and one covariance             06
sharing *   counts, rules, plan, pool                                           03
described   methods and parts as plain data: messages, cache keys               04
methods *   what each method changes, a class of a few lines each; METHODS      04
client *    what a hospital does: report, generate, receive, update, test       04
checks      what the server refuses                                             06
exchange *  before the rounds: reports, samples, pre-training                   03
server *    the rounds, and hospitals on threads                                04
runs        many runs: cached, side by side, resumed                            04, 05
tuning      nested tuning: settings from validation images                      05
privacy     attacks on what leaves a hospital, planted canaries                 06
plots       figures                                                             all
explore     sliders over figures, exercises that check themselves               all
course      the command that runs the lessons
rank        a method of your own against its control, on paired seeds           05
"""
