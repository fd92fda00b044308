-- Writes the checkpoints of several first attempts. For one attempt a plain command is cheaper.
--
-- KEYS    a checkpoint for each task
-- ARGV    1 life in ms; then a checkpoint for each task
-- result  one for each task: false if it was written, else the checkpoint that is there
local results = {}
for i = 1, #KEYS do
  local existing = redis.pcall('SET', KEYS[i], ARGV[i + 1], 'NX', 'GET', 'PX', ARGV[1])
  if type(existing) == 'table' then -- of another type: it is overwritten
    redis.call('SET', KEYS[i], ARGV[i + 1], 'PX', ARGV[1])
    existing = false
  end
  results[i] = existing
end
return results
