-- Writes the runs of several first attempts. One alone is a plain command, which costs no script.
--
-- KEYS  one run a task
-- ARGV  1 life in ms; then one run a task
-- returns one answer a task: false written, else the run that stands
local answers = {}
for i = 1, #KEYS do
  local stands = redis.pcall('SET', KEYS[i], ARGV[i + 1], 'NX', 'GET', 'PX', ARGV[1])
  if type(stands) == 'table' then -- something foreign is there, which has no place here
    redis.call('SET', KEYS[i], ARGV[i + 1], 'PX', ARGV[1])
    stands = false
  end
  answers[i] = stands
end
return answers
