-- Writes runs where nobody else wrote since: every start but a epoch's first, and every change of a run.
--
-- KEYS  one run a task
-- ARGV  1 life in ms; then two a task: what we know to stand there, what is to stand there
-- returns one answer a task: '' written, else the run that stands
local answers = {}
for i = 1, #KEYS do
  local known, value = ARGV[i * 2], ARGV[i * 2 + 1]
  local stands = redis.pcall('GET', KEYS[i])
  if type(stands) ~= 'string' or stands == known or stands == value then
    redis.call('SET', KEYS[i], value, 'PX', ARGV[1])
    answers[i] = ''
  else
    answers[i] = stands
  end
end
return answers
